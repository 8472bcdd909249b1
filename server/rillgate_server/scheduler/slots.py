"""The worker's seats: which are taken, and which the worker has yet to be told are free."""

from collections.abc import Iterable
from heapq import heapify, heappop, heappush


class Slots:
    """Numbers 0 to max_running - 1; the smallest free one is given first.

        take ──▶ taken ──▶ give_back ──▶ free, and in the next plan's `ended_slots`

    A plan's ended slots are freed before its starts, so a slot may end and start in one plan.
    State: the heap of free numbers, the ended ones that no plan has named.
    """

    def __init__(self, max_running: int) -> None:
        """Start with all free."""
        self.max_running = max_running
        self._free = list(range(max_running))
        heapify(self._free)
        # In order, each once: after a lost plan a slot may end again before it was said again.
        self._ended: dict[int, None] = {}

    def __repr__(self) -> str:
        return f"Slots(taken={self.num_taken}, total={self.max_running}, ended={list(self._ended)})"

    @property
    def num_taken(self) -> int:
        """Slots in use."""
        return self.max_running - len(self._free)

    def take(self) -> int:
        """Take the smallest free slot."""
        return heappop(self._free)

    def give_back(self, slot: int) -> None:
        """Free a slot; the next plan tells the worker."""
        heappush(self._free, slot)
        self._ended[slot] = None

    def announce(self) -> tuple[int, ...]:
        """Return what ended since the last plan, for the plan that is being made."""
        announced, self._ended = tuple(self._ended), {}
        return announced

    def plan_failed(self, announced: Iterable[int]) -> None:
        """Say again in the next plan what a failed one said: the worker may not have read it.

        So a worker must take it well when a slot ends that it does not hold.
        """
        self._ended = dict.fromkeys((*announced, *self._ended))

    def check_integrity(self, taken: list[int]) -> None:
        """Prove that every slot is free or in `taken`, once."""
        assert sorted(taken + self._free) == list(range(self.max_running)), (taken, self._free)
