"""The micro-batch window: an idle replica may wait a moment for more requests."""

from dataclasses import replace

import pytest

from rillgate_server.config.groups import BatcherConfig, CacheConfig
from rillgate_server.core.clock import VirtualClock
from rillgate_server.core.model_spec import CacheSizes
from rillgate_server.core.step import StepPlan, StepResult
from rillgate_server.engine.engine import Engine
from rillgate_server.engine.testing import FakeExecutor
from rillgate_server.scheduler.scheduler import Scheduler
from tests.support.answers import MODEL
from tests.support.engine import SPEC, make_request

DELAY_S = 0.020


def gathering(preferred_batch_size: int = 3, delay_ms: float = DELAY_S * 1e3) -> Scheduler:
    """Build an idle scheduler with a window."""
    batcher = BatcherConfig(
        max_running=8, max_queue_delay_ms=delay_ms, preferred_batch_size=preferred_batch_size
    )
    sizes = CacheSizes(num_device_blocks=64, block_bytes=1024, kv_dtype="float32")
    return Scheduler(batcher, CacheConfig(block_size_tokens=4), SPEC, sizes)


def execute(scheduler: Scheduler, plan: StepPlan, now: float) -> StepResult:
    """Run a plan on a fresh fake: good for first steps alone."""
    result = FakeExecutor(64, 4, MODEL).execute(plan)
    scheduler.update(result, now)
    return result


def test_an_idle_scheduler_waits_the_delay_for_a_fuller_batch() -> None:
    """The first request waits no longer than the window, and those that came are one step."""
    scheduler = gathering()
    scheduler.add(make_request(1), 0.0)
    assert scheduler.schedule(0.0) is None
    assert scheduler.seconds_to_wait(0.0) == DELAY_S
    scheduler.add(make_request(2), 0.005)
    assert scheduler.schedule(0.005) is None
    assert scheduler.seconds_to_wait(0.005) == pytest.approx(0.015)
    plan = scheduler.schedule(DELAY_S)
    assert plan is not None
    assert len(plan.starts) == 2


def test_the_preferred_batch_size_ends_the_wait() -> None:
    """Enough requests begin at once."""
    scheduler = gathering(preferred_batch_size=2)
    scheduler.add(make_request(1), 0.0)
    assert scheduler.schedule(0.0) is None
    scheduler.add(make_request(2), 0.001)
    assert scheduler.seconds_to_wait(0.001) == 0.0
    plan = scheduler.schedule(0.001)
    assert plan is not None
    assert len(plan.starts) == 2


def test_a_running_batch_is_joined_without_a_wait() -> None:
    """The window is for idle replicas: a running step is a batch already."""
    scheduler = gathering(preferred_batch_size=1)
    scheduler.add(make_request(1), 0.0)
    first = scheduler.schedule(0.0)
    assert first is not None
    execute(scheduler, first, 0.01)
    scheduler.add(make_request(2), 0.01)
    assert scheduler.seconds_to_wait(0.01) == 0.0
    second = scheduler.schedule(0.01)
    assert second is not None
    assert [start.slot for start in second.starts] == [1]


def test_each_idle_time_has_a_window_of_its_own() -> None:
    """A window that ended with an abort does not shorten the next one."""
    scheduler = gathering()
    scheduler.add(make_request(1), 0.0)
    assert scheduler.schedule(0.0) is None
    scheduler.abort(1)
    assert scheduler.schedule(0.010) is None
    assert scheduler.seconds_to_wait(0.010) == 0.0
    scheduler.add(make_request(2), 0.015)
    assert scheduler.seconds_to_wait(0.015) == pytest.approx(DELAY_S)


def test_a_window_that_nobody_looked_at_again_does_not_shorten_the_next_one() -> None:
    """Without work the engine waits for a command, and asks for no plan."""
    scheduler = gathering()
    scheduler.add(make_request(1), 0.0)
    assert scheduler.schedule(0.0) is None
    scheduler.abort(1)
    assert not scheduler.has_work
    scheduler.add(make_request(2, max_tokens=1), 0.015)
    assert scheduler.schedule(0.015) is None
    assert scheduler.seconds_to_wait(0.015) == pytest.approx(DELAY_S)
    plan = scheduler.schedule(0.040)
    assert plan is not None
    execute(scheduler, plan, 0.050)
    assert not scheduler.has_work, "it ended with its first step"
    scheduler.add(make_request(3), 0.060)
    assert scheduler.schedule(0.060) is None
    assert scheduler.seconds_to_wait(0.060) == pytest.approx(DELAY_S)


def test_without_a_delay_nothing_waits() -> None:
    """The default: a request is computed in the very next step."""
    scheduler = gathering(delay_ms=0.0)
    scheduler.add(make_request(1), 0.0)
    assert scheduler.seconds_to_wait(0.0) == 0.0
    assert scheduler.schedule(0.0) is not None


def test_the_engine_has_nothing_to_do_in_a_window() -> None:
    """Its step gives nothing, and is no failure."""
    scheduler, clock = gathering(), VirtualClock()
    engine = Engine(scheduler, FakeExecutor(64, 4, MODEL), clock)
    scheduler.add(make_request(1), 0.0)
    assert engine.step() is None
    clock.advance(DELAY_S)
    output = engine.step()
    assert output is not None
    assert [started.request_id for started in output.started] == [1]


def test_a_deadline_ends_the_window_in_time() -> None:
    """Who cannot wait for the window is not held back by it, and takes along who waits."""
    scheduler = gathering()
    scheduler.add(make_request(1), 0.0)
    assert scheduler.schedule(0.0) is None
    scheduler.add(replace(make_request(2), deadline_s=0.012), 0.004)
    assert scheduler.seconds_to_wait(0.004) == pytest.approx(0.008)
    plan = scheduler.schedule(0.012)
    assert plan is not None
    assert len(plan.starts) == 2


def test_a_deadline_of_long_ago_shortens_no_later_window() -> None:
    """Each idle time has a window of its own."""
    scheduler = gathering()
    scheduler.add(replace(make_request(1, max_tokens=1), deadline_s=0.001), 0.0)
    plan = scheduler.schedule(0.001)
    assert plan is not None
    execute(scheduler, plan, 0.002)
    scheduler.add(make_request(2), 1.0)
    assert scheduler.seconds_to_wait(1.0) == pytest.approx(DELAY_S)
