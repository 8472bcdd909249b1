"""The engine's thread: commands from anywhere, events out, faults contained."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Event, Thread, get_ident

import pytest

from rillgate_server.core.block_events import BlockDelta, BlockSnapshot
from rillgate_server.core.clock import VirtualClock
from rillgate_server.core.request import ChoiceStart, RejectReason, Request, RequestRejected
from rillgate_server.core.step import StepOutput, StepPlan
from rillgate_server.engine.engine import Engine
from rillgate_server.engine.engine_loop import EngineEvent, EngineLoop
from rillgate_server.engine.testing import FakeExecutor
from rillgate_server.errors import RankLost
from tests.support.answers import MODEL, Answers, reference_answer
from tests.support.engine import Limits, make_request

WAIT_S = 20.0
"""Far more than anything here takes; reached only when a test fails."""

SMALL = Limits()


class Harness:
    """An engine loop whose events are collected and can be waited for."""

    def __init__(
        self, limits: Limits, before_step: Callable[[StepPlan], None] | None = None
    ) -> None:
        """Build a loop that is not started."""
        self.clock = VirtualClock()
        self.scheduler = limits.make_scheduler()
        executor = FakeExecutor(
            limits.num_blocks, limits.block_size_tokens, MODEL, before_step=before_step
        )
        self.answers = Answers()
        self.rejected: dict[int, RequestRejected] = {}
        self.blocks: list[BlockSnapshot | BlockDelta] = []
        self.threads: set[int] = set()
        self.fatal: Exception | None = None
        self.fatal_event = Event()
        self._changed = Condition()
        self.loop = EngineLoop(
            Engine(self.scheduler, executor, self.clock), self.clock, self._take, self._give_up
        )

    def submit(self, request: Request) -> None:
        """Expect an answer, and submit."""
        with self._changed:
            self.answers.expect(request)
        self.loop.submit(request)

    def wait_for(self, claim: Callable[[], bool]) -> None:
        """Wait until an event makes the claim true."""
        with self._changed:
            assert self._changed.wait_for(claim, WAIT_S), "the event never came"

    def has_ended(self, request_id: int) -> bool:
        """Whether a request was answered, refused or failed."""
        answer = self.answers.of[request_id]
        is_finished = len(answer.finished) == len(answer.request.choices)
        return is_finished or answer.failure is not None or request_id in self.rejected

    def _take(self, event: EngineEvent) -> None:
        with self._changed:
            self.threads.add(get_ident())
            if isinstance(event, RequestRejected):
                self.rejected[event.request_id] = event
            elif isinstance(event, StepOutput):
                self.answers.take(event)
                self.scheduler.check_integrity()
            else:
                self.blocks.append(event)
            self._changed.notify_all()

    def _give_up(self, error: Exception) -> None:
        self.fatal = error
        self.fatal_event.set()


@contextmanager
def running(
    limits: Limits = SMALL, before_step: Callable[[StepPlan], None] | None = None
) -> Iterator[Harness]:
    """Start a loop and stop it at the end."""
    harness = Harness(limits, before_step)
    harness.loop.start()
    try:
        yield harness
    finally:
        assert harness.loop.stop(WAIT_S), "the engine thread did not end"


class Gate:
    """Lets the test hold a step: it has begun, and does not go on before the test says so."""

    def __init__(self, at_step: int) -> None:
        """Hold the step with this id."""
        self.begun, self.open = Event(), Event()
        self._at_step = at_step

    def __call__(self, plan: StepPlan) -> None:
        """Wait, on the engine thread."""
        if plan.step_id == self._at_step:
            self.begun.set()
            assert self.open.wait(WAIT_S)


def test_requests_from_many_threads_all_get_their_answers() -> None:
    """Commands are thread-safe, and every event comes on the one engine thread."""
    with running() as harness:

        def submit(first: int) -> None:
            for request_id in range(first, first + 5):
                harness.submit(make_request(request_id, prompt=[request_id + 2] * 6))

        threads = [Thread(target=submit, args=(first,)) for first in (0, 10, 20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        harness.wait_for(lambda: all(map(harness.has_ended, list(harness.answers.of))))
        assert harness.loop.wait_idle(WAIT_S)
        for answer in harness.answers.of.values():
            expected, _ = reference_answer(answer.request, ChoiceStart(0))
            assert tuple(answer.tokens[0]) == expected
        assert len(harness.answers.of) == 15
        assert len(harness.threads) == 1
        assert get_ident() not in harness.threads


def test_a_refusal_comes_as_an_event() -> None:
    """The submitter is not kept waiting for it."""
    with running() as harness:
        harness.submit(make_request(1, prompt=()))
        harness.wait_for(lambda: 1 in harness.rejected)
        assert harness.rejected[1].rejection.reason is RejectReason.INVALID
        assert harness.loop.wait_idle(WAIT_S)


def test_an_abort_during_a_step_frees_the_blocks_after_it() -> None:
    """Nothing is told of the request any more, its neighbour goes on."""
    gate = Gate(at_step=3)
    with running(before_step=gate) as harness:
        harness.submit(make_request(1, max_tokens=100))
        harness.submit(make_request(2))
        assert gate.begun.wait(WAIT_S)
        harness.loop.abort(1)
        gate.open.set()
        harness.wait_for(lambda: harness.has_ended(2))
        assert harness.loop.wait_idle(WAIT_S)
        assert len(harness.answers.of[1].tokens[0]) == 3
        assert harness.loop.load().device.num_blocks_used == 0


def test_draining_refuses_newcomers_and_finishes_the_rest() -> None:
    """`wait_idle` tells when the last accepted request is done."""
    gate = Gate(at_step=2)
    with running(before_step=gate) as harness:
        harness.submit(make_request(1))
        assert gate.begun.wait(WAIT_S)
        harness.loop.drain()
        harness.submit(make_request(2))
        assert not harness.loop.wait_idle(0.0)
        gate.open.set()
        assert harness.loop.wait_idle(WAIT_S)
        assert harness.answers.of[1].finished
        assert harness.rejected[2].rejection.reason is RejectReason.DRAINING
        assert harness.loop.load().is_draining


def test_a_step_that_raises_fails_its_requests_and_the_loop_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The caller gets no text of the exception; the log has it. Later requests are answered."""

    def fail(plan: StepPlan) -> None:
        if plan.step_id in (2, 5):
            raise ValueError("secret")

    with running(before_step=fail) as harness, caplog.at_level(logging.ERROR):
        harness.submit(make_request(1, choices=[ChoiceStart(0), ChoiceStart(1)]))
        harness.wait_for(lambda: harness.has_ended(1))
        failure = harness.answers.of[1].failure
        assert failure == "the engine step failed (ValueError)"
        assert "secret" in caplog.text
        harness.submit(make_request(2))
        harness.wait_for(lambda: harness.has_ended(2))
        harness.submit(make_request(3))
        harness.wait_for(lambda: harness.has_ended(3))
        assert harness.answers.of[2].failure is not None
        assert harness.answers.of[3].finished
        assert harness.fatal is None
        assert harness.loop.wait_idle(WAIT_S)
        assert harness.loop.load().device.num_blocks_used == 0


def test_three_failed_steps_in_a_row_end_the_engine() -> None:
    """`on_fatal` is called, and whoever comes later is refused at once.

    Those in the three steps were failed; the others are told nothing, so that their gateway takes
    them elsewhere when the process ends.
    """

    def fail(plan: StepPlan) -> None:
        raise ValueError(plan.step_id)

    with running(Limits(max_step_tokens=8, max_running=1), fail) as harness:
        for request_id in range(5):
            harness.submit(make_request(request_id, prompt=[7] * 8))
        assert harness.fatal_event.wait(WAIT_S)
        assert str(harness.fatal) == "3"
        assert [harness.answers.of[i].failure is not None for i in range(5)] == [True] * 3 + [
            False,
            False,
        ]
        assert not harness.rejected
        harness.submit(make_request(9))
        assert harness.rejected[9].rejection.reason is RejectReason.DRAINING


def test_a_lost_rank_ends_the_engine_at_once_and_nobody_is_failed() -> None:
    """No event for any request, of the step or not: they go on elsewhere; the end is told once."""

    def lose(plan: StepPlan) -> None:
        raise RankLost("rank 1 is gone")

    with running(Limits(max_running=1), lose) as harness:
        harness.submit(make_request(1))
        harness.submit(make_request(2))
        assert harness.fatal_event.wait(WAIT_S)
        assert str(harness.fatal) == "rank 1 is gone"
        harness.fatal = None
        harness.loop.give_up(RankLost("the watch says so, too"))
    assert harness.fatal is None
    assert [answer.failure for answer in harness.answers.of.values()] == [None, None]
    assert not harness.rejected


def test_an_engine_in_a_step_that_never_returns_can_be_given_up() -> None:
    """The end is told from the caller's thread, and what the step gives in the end is not said."""
    gate = Gate(at_step=2)
    with running(SMALL, gate) as harness:
        harness.submit(make_request(1, max_tokens=100))
        assert gate.begun.wait(WAIT_S)
        num_tokens = sum(map(len, harness.answers.of[1].tokens.values()))
        harness.loop.give_up(RankLost("rank 1 hangs"))
        assert str(harness.fatal) == "rank 1 hangs"
        harness.submit(make_request(2))
        assert harness.rejected.keys() == {2}
        gate.open.set()
    assert sum(map(len, harness.answers.of[1].tokens.values())) == num_tokens
    assert harness.answers.of[1].failure is None


def test_stopping_ends_after_the_step_under_way_and_answers_everybody() -> None:
    """What was running or waiting fails; a request still in the command queue is refused."""
    gate = Gate(at_step=2)
    with running(Limits(max_running=1), gate) as harness:
        harness.submit(make_request(1, max_tokens=100))
        harness.submit(make_request(2))
        assert gate.begun.wait(WAIT_S)
        stopper = Thread(target=harness.loop.stop, args=(WAIT_S,))
        stopper.start()
        gate.open.set()
        stopper.join()
        assert harness.has_ended(1)
        assert harness.has_ended(2)
        assert harness.loop.wait_idle(0.0)
        harness.submit(make_request(3))
        assert 3 in harness.rejected


def test_stopping_a_loop_that_never_started_answers_everybody() -> None:
    """Also what was submitted to it."""
    harness = Harness(Limits())
    harness.submit(make_request(1))
    assert harness.loop.stop(WAIT_S)
    assert harness.rejected.keys() == {1}


def test_the_load_tells_a_frozen_step_from_idleness() -> None:
    """The age grows on the clock while a step hangs, and is 0 without work."""
    gate = Gate(at_step=1)
    with running(before_step=gate) as harness:
        harness.clock.advance(50.0)
        assert harness.loop.load().step_age_s == 0.0
        harness.submit(make_request(1))
        assert gate.begun.wait(WAIT_S)
        harness.clock.advance(7.0)
        assert harness.loop.load().step_age_s == 7.0
        gate.open.set()
        assert harness.loop.wait_idle(WAIT_S)
        assert harness.loop.load().step_age_s == 0.0
        assert harness.loop.load().step_id == 8


def test_a_failing_event_handler_ends_the_engine_instead_of_a_silent_thread() -> None:
    """The border of the thread says so through `on_fatal`."""
    fatal: list[Exception] = []
    done = Event()

    def refuse(event: EngineEvent) -> None:
        raise ConnectionError(type(event).__name__)

    def give_up(error: Exception) -> None:
        fatal.append(error)
        done.set()

    limits, clock = Limits(), VirtualClock()
    executor = FakeExecutor(limits.num_blocks, limits.block_size_tokens, MODEL)
    loop = EngineLoop(Engine(limits.make_scheduler(), executor, clock), clock, refuse, give_up)
    loop.start()
    loop.submit(make_request(1))
    assert done.wait(WAIT_S)
    assert loop.stop(WAIT_S)
    assert isinstance(fatal[0], ConnectionError)


def test_a_flush_happens_between_steps_and_says_how_much() -> None:
    """What is cached and unused is forgotten; who cancelled the flush does not stop the engine."""
    with running(SMALL) as harness:
        harness.submit(make_request(1, prompt=range(10, 30), max_tokens=4))
        harness.wait_for(lambda: harness.has_ended(1))
        assert harness.loop.flush_cache().result(WAIT_S).num_device_blocks == 5
        assert harness.loop.flush_cache().result(WAIT_S).num_device_blocks == 0
        harness.loop.flush_cache().cancel()
        harness.submit(make_request(2))
        harness.wait_for(lambda: harness.has_ended(2))
    assert harness.loop.flush_cache().cancelled(), "an engine that has ended flushes nothing"


def test_blocks_are_told_to_who_watches_between_its_snapshot_and_its_end() -> None:
    """The snapshot comes first; a flush of an idle engine is told too; then nothing is."""
    with running() as harness:
        harness.submit(make_request(1))
        harness.wait_for(lambda: harness.has_ended(1))
        assert harness.loop.wait_idle(WAIT_S)
        assert harness.blocks == []
        harness.loop.watch_blocks(7)
        harness.wait_for(lambda: len(harness.blocks) == 1)
        (snapshot,) = harness.blocks
        assert isinstance(snapshot, BlockSnapshot)
        assert (snapshot.watch_id, snapshot.hashes) == (7, harness.scheduler.cached_hashes())
        assert snapshot.hashes[0]
        harness.loop.flush_cache()
        harness.wait_for(lambda: len(harness.blocks) == 2)
        assert harness.blocks[1] == BlockDelta(is_cleared=True)
        harness.loop.unwatch_blocks(7)
        harness.submit(make_request(2))
        harness.wait_for(lambda: harness.has_ended(2))
        assert harness.loop.wait_idle(WAIT_S)
        assert harness.scheduler.cached_hashes()[0]
        assert len(harness.blocks) == 2
