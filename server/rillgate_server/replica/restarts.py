"""When a child that died is started again, and when its supervisor gives up.

A pure decision over how long each child had served; the supervisor acts on it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Serving for less than `quick_s` is a quick crash; each in a row doubles the wait."""

    first_delay_s: float = 0.1
    longest_delay_s: float = 5.0
    quick_s: float = 30.0
    """From READY on: loading may take long, and a child that dies of it has served nobody."""
    max_quick_crashes: int = 5
    """In a row; with the last one the supervisor gives up."""

    def count(self, quick_crashes: int, served_s: float) -> int:
        """Return the quick crashes in a row, this death included; long service forgets them."""
        return quick_crashes + 1 if served_s < self.quick_s else 0

    def delay_s(self, quick_crashes: int) -> float | None:
        """Return how long to wait before the next start; None: give up."""
        if quick_crashes >= self.max_quick_crashes:
            return None
        return min(self.first_delay_s * 2.0 ** max(0, quick_crashes - 1), self.longest_delay_s)
