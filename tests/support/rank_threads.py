"""Ranks of a split network as threads of one process, of which one computes at a time.

Triton's interpreter may run in one thread at a time: a rank lets go only where it waits for others.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition
from typing import TypeVar

import torch
from torch import Tensor

from rillgate_server.worker.collectives import Collectives

_T = TypeVar("_T")

_WAIT_S = 60.0
"""Far more than anything here takes; reached only when another rank failed."""


class Meeting:
    """Where ranks exchange tensors. State: what has been brought to the next exchange, and what
    the last one gave."""

    def __init__(self, ranks: int) -> None:
        """Begin without any."""
        self.ranks = ranks
        self._condition = Condition()
        self._brought: dict[int, Tensor] = {}  # rank -> tensor
        self._exchanged: list[Tensor] = []
        self._num_exchanges = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Compute while no other rank does."""
        with self._condition:
            yield

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """Return all ranks' tensors; called in a turn, which others have meanwhile."""
        self._brought[rank] = tensor.clone()
        number = self._num_exchanges
        if len(self._brought) == self.ranks:
            self._exchanged = [self._brought[it] for it in range(self.ranks)]
            self._brought = {}
            self._num_exchanges += 1
            self._condition.notify_all()
        assert self._condition.wait_for(lambda: self._num_exchanges > number, _WAIT_S)
        return self._exchanged


class ThreadCollectives(Collectives):
    """A rank's collectives over a meeting."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        """Take part as `rank`."""
        self._meeting = meeting
        self.rank = rank
        self.ranks = meeting.ranks
        self.num_entered = 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        self.num_entered += 1
        parts = self._meeting.exchange(self.rank, tensor)
        return tensor.copy_(torch.stack(parts).sum(dim=0))

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """Join columns on rank 0."""
        self.num_entered += 1
        parts = self._meeting.exchange(self.rank, tensor)
        return torch.cat(parts, dim=-1) if self.rank == 0 else None


def run_ranks(ranks: int, compute: Callable[[Collectives], _T]) -> list[_T]:
    """Return what each rank computes with its collectives."""
    meeting = Meeting(ranks)

    def run(rank: int) -> _T:
        with meeting.turn():
            return compute(ThreadCollectives(meeting, rank))

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))
