"""The engine with two plans in flight: what is begun when, and what becomes of it in the end."""

import logging
import random
from dataclasses import replace

import pytest

from rillgate_server.core.clock import VirtualClock
from rillgate_server.core.request import ChoiceStart
from rillgate_server.core.step import StepPlan, StepTimes
from rillgate_server.engine.engine import Engine
from rillgate_server.engine.executor import (
    Executor,
    InOrderExecutor,
    PacedExecutor,
    PipelinedExecutor,
)
from rillgate_server.engine.testing import CacheMismatch, FakeCopies, PipelinedFakeExecutor
from rillgate_server.errors import RankLost
from tests.support.answers import MODEL, Answers, reference_answer
from tests.support.engine import Limits, make_request
from tests.support.pipelined import TWO, RecordingDevice
from tests.support.tiers import LIMITS, prompt


def engine_of(limits: Limits, executor: Executor) -> Engine:
    """Build an engine with one request of three tokens."""
    engine = Engine(limits.make_scheduler(), executor, VirtualClock())
    assert engine.scheduler.add(make_request(1, max_tokens=3), 0.0) is None
    return engine


def run(engine: Engine) -> None:
    """Step until nothing is left."""
    for _ in range(1000):
        if not engine.scheduler.has_work:
            return
        engine.step()
        engine.scheduler.check_integrity()
    raise AssertionError(f"still at work: {engine}")


def test_a_plan_begins_before_the_result_of_the_one_before_it() -> None:
    """Two at once from the first step on; the last one has nothing behind it."""
    device = RecordingDevice(TWO)
    engine = engine_of(TWO, device)
    run(engine)
    assert device.calls == ["begin 1", "begin 2", "finish 1", "begin 3", "finish 2", "finish 3"]
    assert engine.step() is None


def test_the_smaller_of_both_limits_counts() -> None:
    """A configuration of one plan executes, as an executor does that cannot do better."""
    device = RecordingDevice(TWO)
    run(engine_of(Limits(max_plans_in_flight=1), device))
    assert device.calls == ["execute 1", "execute 2", "execute 3"]
    narrow = RecordingDevice(TWO)
    plain = PacedExecutor(narrow, 0.0)
    assert not isinstance(plain, PipelinedExecutor)
    run(engine_of(TWO, plain))
    assert narrow.calls == ["execute 1", "execute 2", "execute 3"]


def test_an_executor_in_order_computes_when_somebody_waits() -> None:
    """`begin` keeps the plan, `finish` executes it."""
    device = RecordingDevice(TWO)
    in_order = InOrderExecutor(device)
    plan = StepPlan(7, (), ())
    in_order.begin(plan)
    assert device.calls == []
    assert in_order.finish() == in_order.execute(plan)
    assert device.calls == ["execute 7", "execute 7"]
    assert in_order.max_plans_in_flight == 1


def test_a_fake_device_takes_two_plans_and_computes_them_in_order() -> None:
    """A third is refused, and so is `execute` meanwhile; what a step raises, `finish` raises."""

    def fail(plan: StepPlan) -> None:
        if plan.step_id == 2:
            raise ValueError(plan.step_id)

    device = RecordingDevice(TWO, before_step=fail)
    first, second, third = (StepPlan(i, (), ()) for i in (1, 2, 3))
    device.begin(first)
    device.begin(second)
    with pytest.raises(CacheMismatch, match="step 3 is one plan too many"):
        device.begin(third)
    with pytest.raises(CacheMismatch, match="step 3 is executed while others are begun"):
        device.execute(third)
    for _ in range(3):
        device.compute()
    assert device.finish().step_id == 1
    with pytest.raises(ValueError, match="2"):
        device.finish()
    assert device.num_begun == 0


# -- steps that fail ------------------------------------------------------------------------------


def test_what_was_begun_behind_a_step_that_fails_is_waited_for_and_dropped() -> None:
    """The executor has nothing left of it, and the next request is answered."""

    def fail(plan: StepPlan) -> None:
        if plan.step_id == 1:
            raise ValueError("secret")

    device = RecordingDevice(TWO, before_step=fail)
    engine = engine_of(TWO, device)
    with pytest.raises(ValueError, match="secret"):
        engine.step()
    failed = engine.fail_step("lost").failed
    assert [event.request_id for event in failed] == [1]
    assert device.num_begun == 0
    assert device.calls == ["begin 1", "begin 2"]
    engine.scheduler.check_integrity()
    answers, request = Answers(), make_request(2)
    answers.expect(request)
    assert engine.scheduler.add(request, 0.0) is None
    while engine.scheduler.has_work:
        answers.take(engine.step())
    assert tuple(answers.of[2].tokens[0]) == reference_answer(request, ChoiceStart(0))[0]


def test_a_plan_that_cannot_begin_fails_with_the_one_before_it() -> None:
    """That one is waited for, too."""
    device = RecordingDevice(TWO)

    def refuse(plan: StepPlan) -> None:
        if plan.step_id == 2:
            raise ValueError("no room")

    device.before_begin = refuse
    engine = engine_of(TWO, device)
    with pytest.raises(ValueError, match="no room"):
        engine.step()
    assert [event.request_id for event in engine.fail_step("lost").failed] == [1]
    assert device.calls[-1] == "finish 1"
    assert not engine.scheduler.has_work
    engine.scheduler.check_integrity()


def test_a_rank_that_is_lost_behind_a_failed_step_is_not_taken_for_a_fault() -> None:
    """Nothing follows it: the caller must hear."""

    def fail(plan: StepPlan) -> None:
        raise RankLost("rank 1 is gone") if plan.step_id == 2 else ValueError("a fault")

    engine = engine_of(TWO, RecordingDevice(TWO, before_step=fail))
    with pytest.raises(ValueError, match="a fault"):
        engine.step()
    with pytest.raises(RankLost, match="rank 1 is gone"):
        engine.fail_step("lost")


@pytest.mark.parametrize("seed", range(10))
def test_copies_that_end_in_dropped_results_are_over(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is lost, no block stays held, and nobody waits for ever."""
    rng = random.Random(seed)
    limits = replace(LIMITS, num_blocks=24, max_plans_in_flight=2)

    def lose(plan: StepPlan) -> None:
        if rng.random() < 0.15:
            raise ValueError(plan.step_id)

    copies = FakeCopies(copy_steps=lambda job: job.copy_id % 3)
    fake = limits.make_executor(MODEL, copies, before_step=lose)
    engine = Engine(limits.make_scheduler(), PipelinedFakeExecutor(fake), VirtualClock())
    for request_id in range(30):
        request = make_request(request_id, prompt(request_id % 6), max_tokens=12)
        assert engine.scheduler.add(request, 0.0) is None
    num_lost = 0
    with caplog.at_level(logging.CRITICAL):
        for _ in range(3000):
            if not engine.scheduler.has_work:
                break
            try:
                engine.step()
            except ValueError:
                num_lost += 1
                engine.fail_step("lost")
            engine.scheduler.check_integrity()
    load = engine.scheduler.load(0.0)
    assert not engine.scheduler.has_work
    assert num_lost > 3
    assert load.copies.num_stored_blocks > 0
    for tier in (load.device, load.host):
        assert (tier.num_blocks_used, tier.num_blocks_copying) == (0, 0)


# -- the device's idle time -----------------------------------------------------------------------


def test_the_idle_time_is_averaged_over_steps_that_followed_another() -> None:
    """The first step of new work says nothing: the device was rightly idle."""
    device = RecordingDevice(TWO)
    device.times = StepTimes(device_idle_s=5.0)
    engine = engine_of(TWO, device)
    assert engine.step() is not None
    load = engine.scheduler.load(0.0)
    assert (load.device_idle_s_per_step, load.num_following_steps) == (0.0, 0)
    device.times = StepTimes(device_idle_s=0.001)
    engine.step()
    device.times = StepTimes(device_idle_s=0.003)
    run(engine)
    load = engine.scheduler.load(0.0)
    assert load.device_idle_s_per_step == pytest.approx(0.002)
    assert load.num_following_steps == 2


@pytest.mark.parametrize("max_plans", [1, 2])
def test_steps_follow_one_another_with_one_plan_in_flight_as_with_two(max_plans: int) -> None:
    """What is counted does not depend on what is measured with it."""
    limits = Limits(max_plans_in_flight=max_plans)
    engine = engine_of(limits, RecordingDevice(limits))
    run(engine)
    assert engine.scheduler.add(make_request(2, max_tokens=5), 0.0) is None
    run(engine)
    assert engine.scheduler.load(0.0).num_following_steps == 2 + 4
