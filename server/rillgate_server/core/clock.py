"""Time, as an argument.

Decisions take `now` in seconds; only owners of a loop hold a Clock.
"""

import time
from typing import Protocol


class Clock(Protocol):
    """A source of monotonic time."""

    def now(self) -> float:
        """Return seconds since an arbitrary start, never going back."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Return `time.monotonic()`."""
        return time.monotonic()


class VirtualClock:
    """A clock that only moves when told to; for tests and the simulator."""

    def __init__(self, start_s: float = 0.0) -> None:
        """Start at `start_s`."""
        self._now_s = start_s

    def now(self) -> float:
        """Return the current virtual time."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds` (not negative)."""
        assert seconds >= 0
        self._now_s += seconds
