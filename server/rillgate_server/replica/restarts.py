"""When something that died is started again, and when its supervisor gives up.

A pure decision over how long each had served; the supervisor acts on it.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Serving for less than `quick_s` is a quick crash; each in a row doubles the wait."""

    first_delay_s: float = 0.1
    longest_delay_s: float = 5.0
    quick_s: float = 30.0
    """From READY on: loading may take long, and a child that dies of it has served nobody."""
    max_quick_crashes: int = 5
    """In a row; with so many of each that could serve instead, the supervisor gives up."""
    has_others_elsewhere: bool = False
    """Whether replicas that are not the supervisor's serve beside its own."""

    def count(self, quick_crashes: int, served_s: float) -> int:
        """Return the quick crashes in a row, this death included; long service forgets them."""
        return quick_crashes + 1 if served_s < self.quick_s else 0

    def gives_up(self, quick_crashes: int, of_others: Iterable[int] = ()) -> bool:
        """Whether to give up after so many, where others have theirs (one that serves: 0)."""
        return all(count >= self.max_quick_crashes for count in (quick_crashes, *of_others))

    def delay_s(self, quick_crashes: int) -> float:
        """Return how long to wait before the next start."""
        doublings = min(max(0, quick_crashes - 1), 30)  # far beyond any longest delay
        return min(self.first_delay_s * 2.0**doublings, self.longest_delay_s)
