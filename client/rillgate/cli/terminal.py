"""How the commands write: reasoning dimmed, tables, numbers.

Owns everything that depends on what the output is: a terminal or not, rich installed or not.
"""

import re
import sys
from collections.abc import Sequence
from typing import TextIO

from rillgate.types import Chunk, FinishReason, Generation

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    _HAS_RICH = True
except ImportError:  # the base install
    _HAS_RICH = False

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_NUMBER = re.compile(r"[\d.]+(/s)?|-")
CLEAR_SCREEN = "\x1b[H\x1b[2J"

# A model's text goes to a terminal without the bytes that would steer the terminal.
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Take out control characters but newline and tab."""
    return text.translate(_CONTROL)


def dim(text: str, stream: TextIO) -> str:
    """Dim a text where the stream is a terminal."""
    return f"{_DIM}{text}{_PLAIN}" if stream.isatty() else text


class AnswerWriter:
    """Writes one answer to stdout as it comes.

    Owns what was written last. Reasoning is dimmed, and stands apart from the answer.
    """

    def __init__(self, show_reasoning: bool) -> None:
        """Write reasoning too, or the answer alone."""
        self._show_reasoning = show_reasoning
        self._wrote_reasoning = False
        self._wrote_answer = False
        self._at_line_start = True

    def write(self, chunk: Chunk) -> None:
        """Write what a chunk adds."""
        if chunk.reasoning_text and self._show_reasoning:
            self._wrote_reasoning = True
            self._put(dim(self._clean(chunk.reasoning_text), sys.stdout), chunk.reasoning_text)
        # Models put their own number of newlines between the two: one empty line stands for all.
        text = chunk.text if self._wrote_answer else chunk.text.lstrip("\n")
        if text and not self._wrote_answer:
            self._wrote_answer = True
            if self._wrote_reasoning:
                self._end_line()
                self._put("\n", "\n")
        self._put(self._clean(text), text)

    def end(self) -> None:
        """Finish the last line."""
        self._end_line()

    def _end_line(self) -> None:
        if not self._at_line_start:
            self._put("\n", "\n")

    def _clean(self, text: str) -> str:
        return printable(text) if sys.stdout.isatty() else text

    def _put(self, shown: str, text: str) -> None:
        if text:
            sys.stdout.write(shown)
            sys.stdout.flush()
            self._at_line_start = text.endswith("\n")


def numbers_line(
    num_tokens: int, first_s: float, total_s: float, why: FinishReason, num_resumes: int = 0
) -> str:
    """Say what an answer took, as the caller saw it."""
    rate = f", {(num_tokens - 1) / (total_s - first_s):.1f} tokens/s" if total_s > first_s else ""
    resumes = f", resumed {num_resumes} times" if num_resumes else ""
    first_ms = first_s * 1000
    return f"[{num_tokens} tokens, first after {first_ms:.0f} ms{rate}, {why.value}{resumes}]"


def no_answer_reason(generation: Generation) -> str:
    """Say why an answer has no text."""
    why = generation.finish_reason.value
    place = "during the reasoning" if generation.reasoning_text else "at once"
    return f"it ended {place}, after {len(generation.token_ids)} tokens ({why})"


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout: numbers to the right, drawn by rich where it is there."""
    is_number = [
        bool(rows) and all(_NUMBER.fullmatch(row[column]) is not None for row in rows)
        for column in range(len(headers))
    ]
    lines = [list(headers), *(list(map(printable, row)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    if _HAS_RICH and sys.stdout.isatty():
        table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
        for header, to_right in zip(headers, is_number, strict=True):
            table.add_column(header, justify="right" if to_right else "left", no_wrap=True)
        for line in lines[1:]:
            table.add_row(*line)
        # Wide enough for everything: a narrow terminal wraps lines, but no number is cut.
        width = max(Console().width, sum(widths) + 3 * len(widths))
        Console(width=width, markup=False, highlight=False).print(table)
        return
    for line in lines:
        cells = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, is_number, strict=True)
        ]
        print("  ".join(cells).rstrip())
