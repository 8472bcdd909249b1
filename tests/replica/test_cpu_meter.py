"""The machine's idle share, over scripted readings."""

from dataclasses import dataclass

import pytest

from rillgate_server.core.clock import SystemClock, VirtualClock
from rillgate_server.replica.cpu_meter import CpuMeter, MachineTimes


@dataclass
class Times:
    """What the kernel counts."""

    idle: float
    busy: float


def test_the_share_is_that_of_the_time_since_the_latest_reading() -> None:
    """Not since the machine's start; too soon it is the same as before."""
    clock, now = VirtualClock(), Times(1000.0, 50.0)
    meter = CpuMeter(clock, lambda: Times(now.idle, now.busy))
    assert meter.free_fraction() == 1.0
    now.idle, now.busy = 1000.3, 50.1
    clock.advance(0.2)
    assert meter.free_fraction() == pytest.approx(0.75)
    now.busy += 0.05
    clock.advance(0.05)
    assert meter.free_fraction() == pytest.approx(0.75)
    now.busy += 0.35
    clock.advance(0.15)
    assert meter.free_fraction() == pytest.approx(0.0)


def test_a_count_that_stands_still_changes_nothing() -> None:
    """The kernel's steps are coarse, and some counts go back a little."""
    clock, now = VirtualClock(), Times(10.0, 10.0)
    meter = CpuMeter(clock, lambda: Times(now.idle, now.busy))
    now.idle, now.busy = 10.1, 10.1
    clock.advance(0.2)
    assert meter.free_fraction() == pytest.approx(0.5)
    clock.advance(0.2)
    assert meter.free_fraction() == pytest.approx(0.5)
    now.idle, now.busy = 10.0, 10.3
    clock.advance(0.2)
    assert meter.free_fraction() == 0.0


def test_this_machine_can_be_read() -> None:
    """Both counts grow from a start in the past."""
    times = MachineTimes()
    assert times.idle > 0.0
    assert times.busy > 0.0
    assert 0.0 <= CpuMeter(SystemClock()).free_fraction() <= 1.0
