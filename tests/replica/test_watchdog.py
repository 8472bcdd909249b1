"""The watchdog's rule, tick by tick, and its thread."""

import threading

from rillgate_server.core.clock import SystemClock, VirtualClock
from rillgate_server.core.load import (
    FROZEN_AFTER_S,
    UNMEASURED_FROZEN_AFTER_S,
    EngineLoad,
)
from rillgate_server.replica.watchdog import StandstillCount, Watchdog

TICK_S = 0.5
MEASURED = 0.02
"""A longest step, in seconds, far below a tenth of FROZEN_AFTER_S."""


def first_alarm_s(count: StandstillCount, longest_step_s: float, limit_s: float) -> float | None:
    """Let a step stand still; return its age when the alarm comes, if it does within the limit."""
    num_ticks = int(limit_s / TICK_S)
    for tick in range(1, num_ticks + 1):
        age_s = tick * TICK_S
        load = EngineLoad(step_age_s=age_s, longest_step_s=longest_step_s)
        if count.tick(load, 100.0 + age_s):
            return age_s
    return None


def test_a_step_that_stands_still_for_five_seconds_is_an_alarm() -> None:
    """Not before, and at most two ticks later."""
    alarm_s = first_alarm_s(StandstillCount(TICK_S), MEASURED, 60.0)
    assert alarm_s is not None
    assert FROZEN_AFTER_S < alarm_s <= FROZEN_AFTER_S + 2 * TICK_S


def test_long_steps_and_unmeasured_ones_have_longer() -> None:
    """Ten predicted steps, or a minute while none is predicted."""
    alarm_s = first_alarm_s(StandstillCount(TICK_S), 2.0, 60.0)
    assert alarm_s is not None
    assert alarm_s > 20.0
    unmeasured_s = first_alarm_s(StandstillCount(TICK_S), 0.0, 90.0)
    assert unmeasured_s is not None
    assert unmeasured_s > UNMEASURED_FROZEN_AFTER_S


def test_no_alarm_while_steps_end() -> None:
    """However long it goes on: each tick sees a young step."""
    count, clock = StandstillCount(TICK_S), VirtualClock(50.0)
    for _ in range(1000):
        clock.advance(TICK_S)
        assert not count.tick(EngineLoad(step_age_s=0.3, longest_step_s=MEASURED), clock.now())


def test_an_idle_engine_is_no_alarm() -> None:
    """Without work the age is 0."""
    count, clock = StandstillCount(TICK_S), VirtualClock(50.0)
    for _ in range(1000):
        clock.advance(TICK_S)
        assert not count.tick(EngineLoad(longest_step_s=MEASURED), clock.now())


def test_a_process_that_was_stopped_is_given_time_to_go_on() -> None:
    """The clock went on for a minute, the ticks did not: the step gets its five seconds now."""
    count = StandstillCount(TICK_S)
    began_s = 100.0
    alarms = []
    for now in (100.5, 160.0, 160.5, 161.0, 164.0):
        load = EngineLoad(step_age_s=now - began_s, longest_step_s=MEASURED)
        alarms.append(count.tick(load, now))
    assert alarms == [False] * 5


def test_the_thread_calls_once_and_stops() -> None:
    """A frozen load is reported from the watchdog's own thread; after that it watches no more."""
    frozen: list[str] = []
    called = threading.Event()
    clock = SystemClock()
    began_s = clock.now() - 100.0

    def load() -> EngineLoad:
        return EngineLoad(step_age_s=clock.now() - began_s, longest_step_s=MEASURED)

    def on_frozen(load: EngineLoad) -> None:
        frozen.append(threading.current_thread().name)
        called.set()

    watchdog = Watchdog(load, clock, on_frozen, tick_s=0.001)
    watchdog.start()
    # FROZEN_AFTER_S of ticks of a millisecond each.
    assert called.wait(60.0)
    assert frozen == ["rillgate-watchdog"]
    watchdog.stop()
