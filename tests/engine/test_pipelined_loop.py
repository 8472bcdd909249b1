"""The engine's thread with two plans in flight: aborts, faults and its end."""

import logging
from collections.abc import Callable
from threading import Event

import pytest

from rillgate_server.core.clock import VirtualClock
from rillgate_server.core.step import StepOutput, StepPlan, StepTimes
from rillgate_server.engine.engine import Engine
from rillgate_server.engine.engine_loop import EngineEvent, EngineLoop
from rillgate_server.errors import RankLost
from tests.support.answers import Answers
from tests.support.engine import make_request
from tests.support.pipelined import TWO, RecordingDevice

WAIT_S = 20.0
"""Far more than anything here takes; reached only when a test fails."""


class Loop:
    """An engine loop over a pipelined device; its events are collected."""

    def __init__(self, before_step: Callable[[StepPlan], None] | None = None) -> None:
        self.device = RecordingDevice(TWO, before_step)
        self.clock = VirtualClock()
        self.answers = Answers()
        self.fatal: Exception | None = None
        self.is_fatal = Event()
        engine = Engine(TWO.make_scheduler(), self.device, self.clock)
        self.scheduler = engine.scheduler
        self.loop = EngineLoop(engine, self.clock, self._take, self._give_up)

    def submit(self, request_id: int, max_tokens: int = 8) -> None:
        """Expect an answer, and submit."""
        request = make_request(request_id, max_tokens=max_tokens)
        self.answers.expect(request)
        self.loop.submit(request)

    def _take(self, event: EngineEvent) -> None:
        assert isinstance(event, StepOutput)
        self.answers.take(event)
        self.scheduler.check_integrity()

    def _give_up(self, error: Exception) -> None:
        self.fatal = error
        self.is_fatal.set()


class Gate:
    """Holds a step until the test lets it go on."""

    def __init__(self, at_step: int) -> None:
        self.begun, self.open = Event(), Event()
        self._at_step = at_step

    def __call__(self, plan: StepPlan) -> None:
        """Wait, on the engine thread."""
        if plan.step_id == self._at_step:
            self.begun.set()
            assert self.open.wait(WAIT_S)


def test_the_loop_answers_and_is_idle_again() -> None:
    """Nothing is left in flight, and the thread waits."""
    it = Loop()
    it.submit(1)
    it.submit(2)
    it.loop.start()
    assert it.loop.wait_idle(WAIT_S)
    it.answers.check(TWO.block_size_tokens)
    assert it.device.num_begun == 0
    assert it.loop.stop(WAIT_S)


def test_an_abort_with_two_plans_in_flight_frees_the_blocks_after_both() -> None:
    """Nothing more is told of the request."""
    gate = Gate(at_step=3)
    it = Loop(gate)
    it.submit(1, max_tokens=100)
    it.submit(2)
    it.loop.start()
    assert gate.begun.wait(WAIT_S)
    assert it.device.num_begun == 1  # behind the one that is held
    it.loop.abort(1)
    gate.open.set()
    assert it.loop.wait_idle(WAIT_S)
    assert len(it.answers.of[1].tokens[0]) == 3
    assert it.answers.of[2].finished
    assert it.loop.load().device.num_blocks_used == 0
    assert it.loop.stop(WAIT_S)


def test_stopping_waits_for_what_was_begun_and_answers_everybody() -> None:
    """The step under way is told, what is begun behind it is not."""
    gate = Gate(at_step=2)
    it = Loop(gate)
    it.submit(1, max_tokens=100)
    it.loop.start()
    assert gate.begun.wait(WAIT_S)
    assert not it.loop.stop(0.0)
    gate.open.set()
    assert it.loop.stop(WAIT_S)
    assert it.device.num_begun == 0
    assert len(it.answers.of[1].tokens[0]) == 2
    assert it.answers.of[1].failure == "the engine was stopped"
    assert it.loop.load().device.num_blocks_used == 0


def test_a_rank_lost_while_the_loop_stops_fails_nobody() -> None:
    """As at any other time: the requests go on elsewhere."""
    gate = Gate(at_step=2)

    def lose(plan: StepPlan) -> None:
        gate(plan)
        if plan.step_id == 3:
            raise RankLost("rank 1 is gone")

    it = Loop(lose)
    it.submit(1, max_tokens=100)
    it.loop.start()
    assert gate.begun.wait(WAIT_S)
    assert not it.loop.stop(0.0)
    gate.open.set()
    assert it.is_fatal.wait(WAIT_S)
    assert isinstance(it.fatal, RankLost)
    assert it.loop.stop(WAIT_S)
    assert it.answers.of[1].failure is None


def test_a_step_that_raises_in_the_loop_fails_its_requests_alone() -> None:
    """The later plan is dropped with it, and counts as no failure of its own."""

    def fail(plan: StepPlan) -> None:
        if plan.step_id in (2, 5):
            raise ValueError("secret")

    it = Loop(fail)
    it.loop.start()
    for request_id in (1, 2, 3, 4):
        it.submit(request_id)
        assert it.loop.wait_idle(WAIT_S)
    assert it.fatal is None
    assert it.answers.of[1].failure == "the engine step failed (ValueError)"
    assert it.answers.of[4].finished
    assert it.loop.load().device.num_blocks_used == 0
    assert it.loop.stop(WAIT_S)


def test_the_log_says_now_and_then_how_long_the_device_idles(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once in ten seconds while it works; where nobody measures it, never."""

    def pass_time(plan: StepPlan) -> None:
        it.clock.advance(1.0)

    it = Loop(pass_time)
    with caplog.at_level(logging.INFO):
        it.submit(1)
        it.loop.start()
        assert it.loop.wait_idle(WAIT_S)
        assert not [record for record in caplog.records if "idles" in record.message]
        it.device.times = StepTimes(device_idle_s=0.0005)
        it.submit(2, max_tokens=24)
        assert it.loop.wait_idle(WAIT_S)
    said = [record.message for record in caplog.records if "idles" in record.message]
    assert len(said) == 3
    assert it.loop.stop(WAIT_S)
