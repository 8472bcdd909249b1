"""How much of the machine's processor time was idle lately.

Owns the latest reading. The whole machine's, not this process's: a router asks what a node can
still take. Does not see a container's share of it.
"""

from collections.abc import Callable
from typing import Protocol

import psutil

from rillgate_server.core.clock import Clock

MIN_INTERVAL_S = 0.1
"""Between two readings: the kernel counts in steps of 10 ms, and several gateways may ask."""


class CpuTimes(Protocol):
    """Seconds since the machine's start, summed over cores (psutil.cpu_times)."""

    @property
    def idle(self) -> float:
        """With nothing to do."""
        ...

    @property
    def busy(self) -> float:
        """With something to do."""
        ...


class MachineTimes:
    """The kernel's count; about 15 microseconds to read on two cores."""

    def __init__(self) -> None:
        times = psutil.cpu_times()
        # A core that waits for a disk can compute; a guest's time is in the user's already.
        self.idle = times.idle + getattr(times, "iowait", 0.0)
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        self.busy = sum(times) - guests - self.idle


class CpuMeter:
    """Measures between two calls.

    State: the latest reading, its time, and the fraction that it gave.
    """

    def __init__(self, clock: Clock, read: Callable[[], CpuTimes] = MachineTimes) -> None:
        """Begin to measure now."""
        self._clock = clock
        self._read = read
        self._times = read()
        self._read_s = clock.now()
        self._free_fraction = 1.0

    def __repr__(self) -> str:
        return f"CpuMeter(free={self._free_fraction:.2f})"

    def free_fraction(self) -> float:
        """Return the idle share since the latest reading, 0 to 1; 1 before the first one."""
        now = self._clock.now()
        if now - self._read_s >= MIN_INTERVAL_S:
            times = self._read()
            idle_s, busy_s = times.idle - self._times.idle, times.busy - self._times.busy
            if idle_s + busy_s > 0.0:
                self._free_fraction = min(1.0, max(0.0, idle_s / (idle_s + busy_s)))
            self._times, self._read_s = times, now
        return self._free_fraction
