"""Gathers what steps gave until somebody takes it: per choice one entry, whatever the steps.

Used twice: by a replica for each gateway's stream while a write is under way, and by a gateway for
each request until its reader comes. So a slow reader costs a longer entry, never more entries.

    add(step 7: A0 "x")  add(step 8: A0 "y", B0 "z")  take() -> A0 "xy", B0 "z"

Does not know streams, tasks or protobuf; one thread or task owns it.
"""

import itertools
from collections.abc import Iterator

from rillgate_server.core.step import (
    ChoiceFinished,
    ChoiceTokens,
    PromptLogprobs,
    RequestFailed,
    RequestStarted,
    StepOutput,
    TokenLogprobs,
)

StepEntry = RequestStarted | PromptLogprobs | ChoiceTokens | ChoiceFinished | RequestFailed
"""What a StepOutput is made of; each names its request."""

MAX_TAKEN_PROMPT_POSITIONS = 65_536
"""Prompt positions with log-probabilities in one output, unless one prompt alone has more: with 20
alternatives each (about 160 bytes) some 10 MB, well inside a message of 64 MiB."""


def entries_of(output: StepOutput) -> Iterator[StepEntry]:
    """Iterate over an output's entries, in the order that `StepOutput` promises."""
    return itertools.chain(
        output.started, output.prompt_logprobs, output.tokens, output.finished, output.failed
    )


class _PendingTokens:
    """Tokens of one choice that nobody has taken yet."""

    __slots__ = ("logprobs", "token_ids", "token_offset")

    def __init__(self, token_offset: int) -> None:
        self.token_offset = token_offset
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []


class PendingOutput:
    """Outputs that wait to be taken.

    State: the lists below and `num_tokens`, the number of generated tokens among them.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.num_tokens = 0
        self._step_id = 0
        self._started: list[RequestStarted] = []
        # (request id, choice index) -> its tokens, in order of their first
        self._tokens: dict[tuple[int, int], _PendingTokens] = {}
        self._prompt_logprobs: list[PromptLogprobs] = []
        self._finished: list[ChoiceFinished] = []
        self._failed: list[RequestFailed] = []

    def __repr__(self) -> str:
        return (
            f"PendingOutput(step_id={self._step_id}, started={len(self._started)}, "
            f"choices={len(self._tokens)}, tokens={self.num_tokens}, "
            f"finished={len(self._finished)}, failed={len(self._failed)})"
        )

    def __bool__(self) -> bool:
        return bool(
            self._tokens or self._finished or self._started or self._failed or self._prompt_logprobs
        )

    def add(self, step_id: int, entry: StepEntry) -> None:
        """Keep one entry of a step; tokens are appended to those of the choice that wait."""
        if isinstance(entry, ChoiceTokens):
            self.add_tokens(step_id, entry, entry.request_id)
            return
        self._step_id = step_id
        if isinstance(entry, ChoiceFinished):
            self._finished.append(entry)
        elif isinstance(entry, RequestStarted):
            self._started.append(entry)
        elif isinstance(entry, PromptLogprobs):
            self._prompt_logprobs.append(entry)
        else:
            self._failed.append(entry)

    def add_tokens(self, step_id: int, tokens: ChoiceTokens, request_id: int) -> None:
        """Append tokens to those of the choice that wait, under the id that `take` shall give.

        The hot one: with a parameter for the id, no entry is copied to rename its request.
        """
        self._step_id = step_id
        key = (request_id, tokens.choice_index)
        pending = self._tokens.get(key)
        if pending is None:
            pending = self._tokens[key] = _PendingTokens(tokens.token_offset)
        assert pending.token_offset + len(pending.token_ids) == tokens.token_offset, "a gap"
        pending.token_ids.extend(tokens.token_ids)
        pending.logprobs.extend(tokens.logprobs)
        self.num_tokens += len(tokens.token_ids)

    def take(self) -> StepOutput:
        """Return what waits, merged, under the latest step's number.

        Prompts' log-probabilities too many for one message leave first, alone, in parts.
        """
        started, self._started = tuple(self._started), []
        prompt_logprobs = self._take_prompt_logprobs()
        if self._prompt_logprobs:
            return StepOutput(self._step_id, started=started, prompt_logprobs=prompt_logprobs)
        output = StepOutput(
            step_id=self._step_id,
            started=started,
            tokens=tuple(
                ChoiceTokens(
                    request_id,
                    choice_index,
                    pending.token_offset,
                    tuple(pending.token_ids),
                    tuple(pending.logprobs),
                )
                for (request_id, choice_index), pending in self._tokens.items()
            ),
            prompt_logprobs=prompt_logprobs,
            finished=tuple(self._finished),
            failed=tuple(self._failed),
        )
        self._tokens, self._finished, self._failed, self.num_tokens = {}, [], [], 0
        return output

    def _take_prompt_logprobs(self) -> tuple[PromptLogprobs, ...]:
        """Take prompts in order while they fit into one message, and at least one."""
        num_positions = num_taken = 0
        for prompt in self._prompt_logprobs:
            num_positions += len(prompt.positions)
            if num_taken and num_positions > MAX_TAKEN_PROMPT_POSITIONS:
                break
            num_taken += 1
        taken = tuple(self._prompt_logprobs[:num_taken])
        del self._prompt_logprobs[:num_taken]
        return taken
