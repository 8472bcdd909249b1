"""Copies that take a given time: in the simulator, and in front of a real worker (a slow tier).

A channel copies one job after the other, in the order in which they began, as the worker's thread
does.
"""

from collections import deque
from dataclasses import dataclass

from rillgate_server.core.clock import Clock
from rillgate_server.core.step import CopyDone, CopyJob


@dataclass(frozen=True, slots=True)
class CopySpeed:
    """What a copy takes, either way."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: int) -> float:
        """Return the time of one copy."""
        return self.latency_s + num_bytes / self.bytes_per_s


class CopyChannel:
    """Copies under way.

    State: when each ends, in order, and what will be reported of it.
    """

    def __init__(self, clock: Clock, block_bytes: int, reported_over_true: float = 1.0) -> None:
        """Copy blocks of `block_bytes`; a report's seconds are off by `reported_over_true`."""
        self._clock = clock
        self._block_bytes = block_bytes
        self._reported_over_true = reported_over_true
        self._under_way: deque[tuple[float, CopyDone]] = deque()  # (end, report), by end
        self._free_s = 0.0

    def __repr__(self) -> str:
        return f"CopyChannel(under_way={len(self._under_way)})"

    @property
    def next_end_s(self) -> float | None:
        """When the first one ends; None: nothing is under way."""
        return self._under_way[0][0] if self._under_way else None

    def begin(self, job: CopyJob, speed: CopySpeed) -> None:
        """Begin a copy behind those before it."""
        num_bytes = len(job.pairs) * self._block_bytes
        seconds = speed.seconds(num_bytes)
        self._free_s = max(self._free_s, self._clock.now()) + seconds
        done = CopyDone(
            job.copy_id, num_bytes=num_bytes, seconds=seconds * self._reported_over_true
        )
        self._under_way.append((self._free_s, done))

    def take_finished(self) -> tuple[CopyDone, ...]:
        """Return the reports of copies that have ended by now."""
        now = self._clock.now()
        finished = []
        while self._under_way and self._under_way[0][0] <= now:
            finished.append(self._under_way.popleft()[1])
        return tuple(finished)
