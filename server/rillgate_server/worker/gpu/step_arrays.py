"""A step as arrays for a GPU: made on the CPU without a loop over tokens, copied over in one piece.

Owns the arrays' layout, and how a step is cut in two. Does not know slots' states (input_batch
does), nor attention.

    fields:  [5, num_tokens]    token id | position | block | offset in it | slot
             runs behind one another; a token id of -1 is what the slot has drawn last, which only
             the device knows yet
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]

UNKNOWN = -1
"""A token id that is on the device."""
NUM_FIELDS = 5
NO_BLOCK = -1
"""Of a token that is padding: it is stored nowhere."""


@dataclass(frozen=True, slots=True)
class Run:
    """Positions of one slot that follow one another; a decode row, or a chunk."""

    slot: int
    start: int
    token_ids: Sequence[int]
    table: Ints
    """The slot's blocks, at least those up to its last position."""


@dataclass(frozen=True, slots=True)
class StepArrays:
    """A step: its tokens' fields, and its runs, a number for each."""

    fields: Ints
    """[5, num_tokens]."""
    offset: Ints
    """Of the run's first token."""
    start: Ints
    num_tokens: Ints
    tables: list[Ints]
    """Each run's blocks, up to its last position."""

    @classmethod
    def of(cls, runs: Sequence[Run], block_size_tokens: int) -> "StepArrays":
        """Lay runs behind one another."""
        start = np.array([run.start for run in runs])
        num_tokens = np.array([len(run.token_ids) for run in runs])
        offset = np.cumsum(num_tokens) - num_tokens
        tables = [
            run.table[: -(-(run.start + len(run.token_ids)) // block_size_tokens)] for run in runs
        ]
        lengths = np.array([len(table) for table in tables])
        table_at = np.cumsum(lengths) - lengths
        fields = np.empty((NUM_FIELDS, int(num_tokens.sum())), dtype=np.int64)
        fields[0] = [token for run in runs for token in run.token_ids]
        fields[1] = np.arange(fields.shape[1]) + np.repeat(start - offset, num_tokens)
        at = np.repeat(table_at, num_tokens) + fields[1] // block_size_tokens
        fields[2] = np.concatenate(tables)[at]
        fields[3] = fields[1] % block_size_tokens
        fields[4] = np.repeat([run.slot for run in runs], num_tokens)
        return cls(fields, offset, start, num_tokens, tables)

    @property
    def size(self) -> int:
        """Tokens in all."""
        return int(self.fields.shape[1])

    @property
    def is_decode(self) -> bool:
        """Whether each run is one token."""
        return len(self.offset) == self.size

    def halves(self) -> "tuple[StepArrays, StepArrays]":
        """Cut the tokens in two: computed one after the other they give what the whole gives."""
        middle = self.size // 2
        return self._part(0, middle), self._part(middle, self.size)

    def _part(self, first: int, last: int) -> "StepArrays":
        """Take the tokens from `first` to `last`; a run at a border is cut."""
        begin = np.maximum(self.offset, first)
        num_tokens = np.minimum(self.offset + self.num_tokens, last) - begin
        kept = np.flatnonzero(num_tokens > 0)
        return StepArrays(
            self.fields[:, first:last],
            (begin - first)[kept],
            (self.start + begin - self.offset)[kept],
            num_tokens[kept],
            [self.tables[i] for i in kept],
        )

    def fields_on(self, device: torch.device, size: int = 0) -> Tensor:
        """Copy the fields over, without waiting for what the device is at; [5, size or more].

        Up to `size` follows padding: token 0 at position 0, stored nowhere.
        """
        size = max(size, self.size)
        staged = torch.zeros(NUM_FIELDS, size, dtype=torch.int64, pin_memory=device.type == "cuda")
        fields = staged.numpy()
        fields[:, : self.size] = self.fields
        fields[2, self.size :] = NO_BLOCK
        return staged.to(device, non_blocking=True)


def fill_unknown(fields: Tensor, last_tokens: Tensor) -> None:
    """Put in the token ids that only the device knows. fields: as in StepArrays, on the device;
    last_tokens: [num_slots], int64. What a broken row left (-1) becomes 0: nobody will see it."""
    known = fields[0]
    drawn = last_tokens[fields[4]]
    torch.where(known < 0, drawn, known, out=known)
    known.clamp_(min=0)
