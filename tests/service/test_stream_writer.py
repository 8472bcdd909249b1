"""The writer of one stream: what comes while a write is under way leaves together."""

import asyncio

import pytest

from rillgate_server.core.step import TokenLogprobs
from rillgate_server.service.generate_call import (
    ChoiceEnd,
    EndReason,
    OutputDelta,
    Started,
    StreamUpdate,
    Usage,
)
from rillgate_server.service.stream_writer import MAX_POSITIONS, StreamWriter

STARTED = Started("r", "v", 1, 3, 0, b"", 0, False)
END = ChoiceEnd(0, EndReason.STOP, Usage(3, 5))


class SlowWire:
    """Takes one update at a time, and lets it go when the test says so."""

    def __init__(self) -> None:
        self.updates: list[StreamUpdate] = []
        self.arrived = asyncio.Event()
        self._leave = asyncio.Semaphore(0)

    async def write(self, update: StreamUpdate) -> None:
        """Take an update and wait for leave."""
        self.updates.append(update)
        self.arrived.set()
        await self._leave.acquire()

    async def next(self) -> StreamUpdate:
        """Wait for the next write to begin."""
        await asyncio.wait_for(self.arrived.wait(), 10)
        self.arrived.clear()
        return self.updates[-1]

    def let_go(self) -> None:
        """End the write under way."""
        self._leave.release()


def delta(offset: int, *token_ids: int, choice: int = 0, text: str = "") -> OutputDelta:
    """Build a delta with a log-probability per token."""
    logprobs = tuple(TokenLogprobs(token_id, -1.0) for token_id in token_ids)
    return OutputDelta(choice, offset, token_ids, text, text.upper(), logprobs)


async def test_the_first_token_leaves_at_once_and_later_ones_gather_meanwhile() -> None:
    """While the first write is under way, everything joins into one update per choice."""
    wire = SlowWire()
    writer = StreamWriter(wire.write)
    run = asyncio.create_task(writer.run())
    writer.add_started(STARTED)
    writer.add_output(delta(0, 7, text="a"))
    first = await wire.next()
    assert first.started == STARTED
    assert first.outputs == (delta(0, 7, text="a"),)
    for offset, text in ((1, "b"), (2, "c"), (3, "d")):
        writer.add_output(delta(offset, offset, text=text))
    writer.add_output(delta(0, 9, choice=1))
    writer.add_end(END)
    wire.let_go()
    second = await wire.next()
    assert second.started is None
    assert second.outputs == (
        OutputDelta(
            0, 1, (1, 2, 3), "bcd", "BCD", tuple(TokenLogprobs(token, -1.0) for token in (1, 2, 3))
        ),
        delta(0, 9, choice=1),
    )
    assert second.ended == (END,)
    writer.close()
    wire.let_go()
    await asyncio.wait_for(run, 10)
    assert len(wire.updates) == 2


async def test_an_error_comes_after_what_had_gathered() -> None:
    """Tokens that arrived are written before the stream fails."""
    wire = SlowWire()
    writer = StreamWriter(wire.write)
    writer.add_started(STARTED)
    writer.add_output(delta(0, 7))
    writer.fail(RuntimeError("lost"))
    run = asyncio.create_task(writer.run())
    assert (await wire.next()).outputs
    wire.let_go()
    with pytest.raises(RuntimeError, match="lost"):
        await asyncio.wait_for(run, 10)


async def test_a_closed_writer_ignores_a_later_error() -> None:
    """A stream that its deadline ended is over, whatever the replica says next."""
    wire = SlowWire()
    writer = StreamWriter(wire.write)
    writer.close()
    writer.fail(RuntimeError("late"))
    await asyncio.wait_for(writer.run(), 10)
    assert wire.updates == []


async def test_cancelling_a_write_ends_the_run() -> None:
    """A caller that went away while a write was under way frees the task."""
    wire = SlowWire()
    writer = StreamWriter(wire.write)
    run = asyncio.create_task(writer.run())
    writer.add_output(delta(0, 7))
    await wire.next()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run


async def test_what_gathers_behind_a_slow_reader_leaves_in_messages_of_bounded_size() -> None:
    """Everything arrives once and in order, prompt first, and an end after all of its choice."""
    updates: list[StreamUpdate] = []

    async def write(update: StreamUpdate) -> None:
        updates.append(update)

    writer = StreamWriter(write)
    writer.add_started(STARTED)
    prompt = tuple(TokenLogprobs(token_id, -1.0) for token_id in range(MAX_POSITIONS * 3 // 2))
    writer.add_prompt_logprobs(prompt)
    for offset in range(MAX_POSITIONS):
        for choice in (0, 1):
            writer.add_output(delta(offset, offset, choice=choice))
    writer.add_end(END)
    writer.close()
    await asyncio.wait_for(writer.run(), 10)
    sizes = [
        len(update.prompt_logprobs) + sum(len(output.token_ids) for output in update.outputs)
        for update in updates
    ]
    assert sizes == [MAX_POSITIONS, MAX_POSITIONS, MAX_POSITIONS, MAX_POSITIONS // 2]
    assert [position for update in updates for position in update.prompt_logprobs] == list(prompt)
    assert not updates[0].outputs, "the prompt's log-probabilities come first"
    assert [update.started is not None for update in updates] == [True, False, False, False]
    for choice in (0, 1):
        outputs = [it for update in updates for it in update.outputs if it.choice_index == choice]
        ids = [token_id for output in outputs for token_id in output.token_ids]
        assert ids == list(range(MAX_POSITIONS))
    assert [update.ended for update in updates] == [(), (), (END,), ()]
