"""One writer per stream: while a write is under way, what comes gathers and leaves together.

So a token is not a message: a slow reader, or many streams on one loop, make messages fewer and
longer, and the first token still leaves at once. Owns what waits to be written, and how much of it
one message takes. Does not know gRPC, and does not bound what waits: a request's max_tokens does.
"""

import asyncio
from collections.abc import Awaitable, Callable

from rillgate_server.core.step import TokenLogprobs
from rillgate_server.service.generate_call import ChoiceEnd, OutputDelta, Started, StreamUpdate

MAX_POSITIONS = 4096
"""Positions (a token, its log-probabilities) in one message, about: 1 MB where each has 20
alternatives. A caller's stub takes 4 MiB unless it is told otherwise."""


class StreamWriter:
    """Gathers a stream's updates; `run` writes them until `close` or `fail`.

    State: what waits (`_started`, `_outputs`, `_ended`, `_prompt_logprobs`), whether anything may
    still come (`_is_closed`), and the error that ends the stream after what waits was written.
    """

    def __init__(self, write: Callable[[StreamUpdate], Awaitable[None]]) -> None:
        """Write with `write`, one call at a time."""
        self._write = write
        self._wake = asyncio.Event()
        self._started: Started | None = None
        self._outputs: dict[int, list[OutputDelta]] = {}  # choice index -> deltas, in order
        self._ended: list[ChoiceEnd] = []
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._is_closed = False
        self._error: Exception | None = None

    def __repr__(self) -> str:
        return (
            f"StreamWriter(choices={len(self._outputs)}, ended={len(self._ended)}, "
            f"closed={self._is_closed}, error={self._error!r})"
        )

    def add_started(self, started: Started) -> None:
        """Give what the first message carries; before anything else."""
        self._started = started
        self._wake.set()

    def add_prompt_logprobs(self, positions: tuple[TokenLogprobs, ...]) -> None:
        """Give the prompt's log-probabilities, once."""
        self._prompt_logprobs = positions
        self._wake.set()

    def add_output(self, delta: OutputDelta) -> None:
        """Give what is new of a choice."""
        self._outputs.setdefault(delta.choice_index, []).append(delta)
        self._wake.set()

    def add_end(self, end: ChoiceEnd) -> None:
        """Give the end of a choice; nothing may follow for it."""
        self._ended.append(end)
        self._wake.set()

    def close(self) -> None:
        """Say that nothing more comes."""
        self._is_closed = True
        self._wake.set()

    def fail(self, error: Exception) -> None:
        """Let `run` raise `error` once what waits is written."""
        if not self._is_closed:
            self._error = error
        self.close()

    async def run(self) -> None:
        """Write until nothing more comes; raises the error given to `fail`, and `write`'s own."""
        while True:
            update = self._take()
            if update is not None:
                await self._write(update)
            elif self._error is not None:
                raise self._error
            elif self._is_closed:
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    def _take(self) -> StreamUpdate | None:
        """Take all that waits as one update, or as much of its beginning as one should hold."""
        if not (self._outputs or self._ended or self._started or self._prompt_logprobs):
            return None
        started, self._started = self._started, None
        prompt_logprobs = self._prompt_logprobs[:MAX_POSITIONS]
        self._prompt_logprobs = self._prompt_logprobs[MAX_POSITIONS:]
        outputs = self._take_outputs(MAX_POSITIONS - len(prompt_logprobs))
        ended = tuple(end for end in self._ended if not self._must_wait(end))
        self._ended = [end for end in self._ended if self._must_wait(end)]
        return StreamUpdate(started, outputs, ended, prompt_logprobs)

    def _must_wait(self, end: ChoiceEnd) -> bool:
        """Tell whether something that comes before this end waits still."""
        return bool(self._prompt_logprobs) or end.choice_index in self._outputs

    def _take_outputs(self, room: int) -> tuple[OutputDelta, ...]:
        """Take outputs, each choice's in order, until `room` positions are full."""
        taken: dict[int, list[OutputDelta]] = {}  # choice index -> deltas
        for choice_index, deltas in tuple(self._outputs.items()):
            num_taken = 0
            while num_taken < len(deltas) and room > 0:
                room -= max(len(deltas[num_taken].token_ids), 1)
                num_taken += 1
            if num_taken:
                taken[choice_index] = deltas[:num_taken]
            if num_taken < len(deltas):
                self._outputs[choice_index] = deltas[num_taken:]
                break
            del self._outputs[choice_index]
        return tuple(map(joined, taken.values()))


def joined(deltas: list[OutputDelta]) -> OutputDelta:
    """Join one choice's deltas, at least one, in order."""
    first = deltas[0]
    if len(deltas) == 1:
        return first
    return OutputDelta(
        first.choice_index,
        first.token_offset,
        tuple(token_id for delta in deltas for token_id in delta.token_ids),
        "".join(delta.text for delta in deltas),
        "".join(delta.reasoning_text for delta in deltas),
        tuple(position for delta in deltas for position in delta.logprobs),
    )
