"""How answers and tables are written where stdout is no terminal."""

import pytest

from rillgate.cli.terminal import AnswerWriter, numbers_line, print_table, printable
from rillgate.types import Chunk, FinishReason


def _chunk(text: str = "", reasoning: str = "") -> Chunk:
    return Chunk(0, text, reasoning, (1,), 0, (), None, "", None)


@pytest.mark.parametrize(
    ("show_reasoning", "written"),
    [(True, "Let me see.\n\nIt is 42.\n"), (False, "It is 42.\n")],
)
def test_the_answer_stands_apart_from_the_reasoning(
    show_reasoning: bool, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One empty line between them, however the model breaks its lines; none before the answer."""
    writer = AnswerWriter(show_reasoning)
    for chunk in (
        _chunk(reasoning="Let me"),
        _chunk(reasoning=" see.\n"),
        _chunk(text="\n"),
        _chunk(text="It is"),
        _chunk(text=" 42."),
    ):
        writer.write(chunk)
    writer.end()
    assert capsys.readouterr().out == written


def test_nothing_written_stays_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """No empty line for an answer that never came."""
    AnswerWriter(show_reasoning=True).end()
    assert capsys.readouterr().out == ""


def test_table_columns_align_and_numbers_stand_right(capsys: pytest.CaptureFixture[str]) -> None:
    """Texts to the left, numbers to the right, nothing cut."""
    print_table(("name", "n"), [("a", "5"), ("longer", "1234"), ("-", "-")])
    assert capsys.readouterr().out.splitlines() == [
        "name       n",
        "a          5",
        "longer  1234",
        "-          -",
    ]


def test_control_characters_are_taken_out_and_the_rest_kept() -> None:
    """Newline, tab and every printing character of any script stay."""
    assert printable("a\x1b[2J\r\x00b\n\tü漢\x9b") == "a[2Jb\n\tü漢"


def test_the_numbers_line_says_what_there_is_to_say() -> None:
    """One token has no time between tokens, and most streams are never resumed."""
    assert (
        numbers_line(1, 0.5, 0.5, FinishReason.LENGTH) == "[1 tokens, first after 500 ms, length]"
    )
    line = numbers_line(11, 0.5, 1.5, FinishReason.STOP)
    assert line == "[11 tokens, first after 500 ms, 10.0 tokens/s, stop]"
    line = numbers_line(1, 0.5, 0.5, FinishReason.STOP, num_resumes=2)
    assert line == "[1 tokens, first after 500 ms, stop, resumed 2 times]"
