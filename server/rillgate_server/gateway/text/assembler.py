"""Assembles what a caller reads of one choice from the token ids of that choice.

Owns the order: ids, characters (detokenizer), stop strings, reasoning. Does not know requests,
streams, logprobs or usage.

E(ids), what the caller has after ids, is a pure function of (prompt, stop strings, min_tokens, the
ids), whatever the grouping: each stage is one of the text before it. So a continuation is
push(given), its delta dropped, and then push(new).

Stop strings are looked for in the whole generated text, reasoning and tags included, as servers of
R1-like models do: the match and what follows are no text at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rillgate_server.gateway.text.detokenizer import Detokenizer
from rillgate_server.gateway.text.reasoning import ReasoningSplitter
from rillgate_server.gateway.text.stop_strings import StopAutomaton, StopMatcher
from rillgate_server.gateway.text.token_pieces import TokenPieces


class DecodingModel(Protocol):
    """What the assembler needs of a model's text side."""

    @property
    def pieces(self) -> TokenPieces:
        """The bytes behind each id, special tokens silent."""
        ...

    def starts_in_reasoning(self, prompt_token_ids: Sequence[int]) -> bool:
        """Say whether the prompt leaves <think> open."""
        ...


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What some ids brought."""

    text: str
    """New text of the answer."""
    reasoning_text: str
    """New text of the reasoning; it comes before `text`."""
    num_tokens_used: int
    """How many of the pushed ids belong to the choice: all, or up to the one that completes the
    stop string."""
    stop_string: str | None = None
    """The stop string that ended the choice."""


class TextAssembler:
    """The text of one choice."""

    # Mutable state: the three stages, _num_tokens (pushed so far), _stop_string (once it matched).

    def __init__(
        self,
        model_text: DecodingModel,
        prompt_token_ids: Sequence[int],
        stop_strings: Sequence[str] = (),
        min_tokens: int = 0,
        *,
        silent_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Begin with no ids.

        `min_tokens`: a stop string that completes with an earlier token is text like any other.
        `silent_token_ids`: ids that give no text, such as the request's stop ids; the model's
        special tokens never do.
        """
        self._detokenizer = Detokenizer(model_text.pieces)
        self._matcher = StopMatcher(StopAutomaton(stop_strings)) if stop_strings else None
        self._splitter = ReasoningSplitter(
            starts_in_reasoning=model_text.starts_in_reasoning(prompt_token_ids)
        )
        self._silent_token_ids = silent_token_ids
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._stop_string: str | None = None

    def __repr__(self) -> str:
        """Show the counts and the end."""
        return f"TextAssembler(num_tokens={self._num_tokens}, stop_string={self._stop_string!r})"

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Append ids; return what they bring. After a stop string nothing comes any more."""
        if self._stop_string is not None:
            return TextDelta("", "", 0, self._stop_string)
        if self._matcher is None:
            self._num_tokens += len(token_ids)
            return self._split(self._decode(self._detokenizer, token_ids), len(token_ids))
        # The first min_tokens - 1 tokens cannot complete a match.
        num_unarmed = min(max(self._min_tokens - 1 - self._num_tokens, 0), len(token_ids))
        unarmed = self._decode(self._detokenizer, token_ids[:num_unarmed])
        text = self._matcher.push(unarmed, is_armed=False).text
        armed_ids = token_ids[num_unarmed:]
        before = self._detokenizer.copy()
        scan = self._matcher.push(self._decode(self._detokenizer, armed_ids))
        num_used = len(token_ids)
        if scan.stop_string is not None:
            self._stop_string = scan.stop_string
            num_used = num_unarmed + self._num_tokens_until(before, armed_ids, scan.end)
        self._num_tokens += num_used
        return self._split(text + scan.text, num_used)

    def finish(self) -> TextDelta:
        """Return what was withheld, for a choice that has ended; nothing may be pushed after it.

        A choice that somebody may go on with (a deadline) is not finished: its caller has E(ids).
        """
        if self._stop_string is not None:
            return TextDelta("", "", 0, self._stop_string)
        withheld = self._matcher.finish() if self._matcher else ""
        settled = self._splitter.push(withheld + self._detokenizer.finish())
        rest = self._splitter.finish()
        return TextDelta(
            settled.answer_text + rest.answer_text, settled.reasoning_text + rest.reasoning_text, 0
        )

    def _decode(self, detokenizer: Detokenizer, token_ids: Sequence[int]) -> str:
        """Push ids, the silent ones left out."""
        if self._silent_token_ids:
            silent = self._silent_token_ids
            token_ids = [token_id for token_id in token_ids if token_id not in silent]
        return detokenizer.push(token_ids)

    def _num_tokens_until(
        self, before: Detokenizer, token_ids: Sequence[int], num_characters: int
    ) -> int:
        """Return how many of the ids it takes to get that many characters."""
        for index, token_id in enumerate(token_ids):
            num_characters -= len(self._decode(before, (token_id,)))
            if num_characters <= 0:
                return index + 1
        raise AssertionError("the ids gave these characters a moment ago")

    def _split(self, text: str, num_used: int) -> TextDelta:
        """Split settled text into reasoning and answer; all of it if the choice has ended."""
        split = self._splitter.push(text)
        if self._stop_string is None:
            return TextDelta(split.answer_text, split.reasoning_text, num_used)
        rest = self._splitter.finish()
        return TextDelta(
            split.answer_text + rest.answer_text,
            split.reasoning_text + rest.reasoning_text,
            num_used,
            self._stop_string,
        )
