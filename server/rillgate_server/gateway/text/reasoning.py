"""Splits a text into the reasoning between <think> and </think> and the answer after it.

Owns what is withheld for a tag that may be coming. Does not know tokens or stop strings.

At most one reasoning section, at the text's beginning:

    (whitespace) <think> \\n… reasoning \\n… </think> \\n… answer
    ^ both dropped; optional where the prompt has left <think> open

* The newlines directly around the tags belong to the tags, and are dropped with them.
* A section that never closes is reasoning to its end, its last newlines included.
* A text that begins otherwise is all answer, and so is everything after </think>: a tag there is
  a text about tags, and stands.

The two texts so far are a function of the text so far, however it was cut. Linear time.
"""

from dataclasses import dataclass
from enum import Enum, auto

OPENING_TAG = "<think>"
CLOSING_TAG = "</think>"
_NEWLINE = "\n"


class _Place(Enum):
    """Where in the drawing above the splitter is."""

    BEFORE = auto()
    """Only whitespace so far, and perhaps a beginning of the opening tag."""
    REASONING_START = auto()
    REASONING = auto()
    ANSWER_START = auto()
    ANSWER = auto()


@dataclass(frozen=True, slots=True)
class SplitText:
    """What a piece of text brought; the reasoning comes before the answer."""

    reasoning_text: str
    answer_text: str


class ReasoningSplitter:
    """One text's place in the drawing."""

    # Mutable state: _place; what is withheld: _whitespace (BEFORE), _num_newlines (REASONING: a
    # count, since a run of them must not cost its square), _tag (a beginning of the next tag).

    def __init__(self, *, starts_in_reasoning: bool) -> None:
        """Begin; `starts_in_reasoning`: the prompt has left <think> open."""
        self._starts_in_reasoning = starts_in_reasoning
        self._place = _Place.BEFORE
        self._whitespace: list[str] = []
        self._num_newlines = 0
        self._tag = ""

    def __repr__(self) -> str:
        """Show the place."""
        return f"ReasoningSplitter({self._place.name}, tag={self._tag!r})"

    def push(self, text: str) -> SplitText:
        """Take more text; return what it settles."""
        if self._place is _Place.BEFORE:
            text = self._leave_before(text)
        reasoning_text = ""
        if self._place is _Place.REASONING_START and (text := text.lstrip(_NEWLINE)):
            self._place = _Place.REASONING
        if self._place is _Place.REASONING:
            reasoning_text, text = self._reason(text)
        if self._place is _Place.ANSWER_START and (text := text.lstrip(_NEWLINE)):
            self._place = _Place.ANSWER
        return SplitText(reasoning_text, text)

    def finish(self) -> SplitText:
        """Return what was withheld: no more text comes, so no tag does."""
        if self._place is _Place.BEFORE:
            text = self._no_opening_tag(self._tag)
            self._tag = ""
            settled = self.push(text)
            rest = self.finish()
            return SplitText(settled.reasoning_text + rest.reasoning_text, settled.answer_text)
        withheld = _NEWLINE * self._num_newlines + self._tag
        self._num_newlines, self._tag = 0, ""
        return SplitText(withheld, "")

    def _leave_before(self, text: str) -> str:
        """Look for the opening tag; return the text behind it, or all text if it cannot come."""
        known = self._tag + text
        if not self._tag:
            known = text.lstrip()
            self._whitespace.append(text[: len(text) - len(known)])
        self._tag = ""
        if known.startswith(OPENING_TAG):
            self._whitespace.clear()
            self._place = _Place.REASONING_START
            return known[len(OPENING_TAG) :]
        if OPENING_TAG.startswith(known):  # also when nothing but whitespace has come
            self._tag = known
            return ""
        return self._no_opening_tag(known)

    def _no_opening_tag(self, known: str) -> str:
        """Leave BEFORE without a tag; return all text so far."""
        self._place = _Place.REASONING_START if self._starts_in_reasoning else _Place.ANSWER
        text = "".join(self._whitespace) + known
        self._whitespace.clear()
        return text

    def _reason(self, text: str) -> tuple[str, str]:
        """Return (settled reasoning, text behind the closing tag)."""
        known = self._tag + text
        end = known.find(CLOSING_TAG)
        if end >= 0:
            body = known[:end].rstrip(_NEWLINE)
            settled = _NEWLINE * self._num_newlines + body if body else ""
            self._num_newlines, self._tag = 0, ""
            self._place = _Place.ANSWER_START
            return settled, known[end + len(CLOSING_TAG) :]
        num_held = _longest_beginning(known, CLOSING_TAG)
        self._tag = known[len(known) - num_held :]
        known = known[: len(known) - num_held]
        body = known.rstrip(_NEWLINE)
        num_trailing = len(known) - len(body)
        if not body:
            self._num_newlines += num_trailing
            return "", ""
        settled = _NEWLINE * self._num_newlines + body
        self._num_newlines = num_trailing
        return settled, ""


def _longest_beginning(text: str, tag: str) -> int:
    """Return the length of the longest suffix of the text that is a proper beginning of the tag."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
