"""Decode steps whose arrays lie at fixed places, for launches that a CUDA graph has captured.

Owns those arrays and their capacity. Does not know graphs (worker.gpu.cuda_graphs), nor tokens.

A captured step has a fixed number of rows, of which the last may be padding: no item names them,
and their keys and values are stored nowhere. Each size lays the same memory out for itself:

    counts | items | joins, per window | block tables of the rows, one behind another
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rillgate_server.worker.attention import tiles
from rillgate_server.worker.attention.tiles import NUM_ITEM_FIELDS, NUM_JOIN_FIELDS, Ints, Rows
from rillgate_server.worker.attention.triton_paged import (
    Pieces,
    TritonPagedAttention,
    TritonStep,
    pinned_int32,
)
from rillgate_server.worker.layer_cache import SlotMapping

_NUM_COUNTS = 2


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a size has its arrays: numbers of int32."""

    num_rows: int
    num_items: int
    """Of one window."""

    @property
    def window_size(self) -> int:
        """Of the counts, items and joins of one window."""
        return _NUM_COUNTS + NUM_ITEM_FIELDS * self.num_items + NUM_JOIN_FIELDS * self.num_rows


class StaticDecode:
    """The arrays. State: their contents, which belong to the step filled last."""

    def __init__(
        self, attention: TritonPagedAttention, max_rows: int, max_context_tokens: int
    ) -> None:
        """Have room for so many rows of so many tokens."""
        self._attention = attention
        layout = attention.storage.layout
        self._block_size = layout.block_size_tokens
        self._num_cached_tokens = attention.storage.num_blocks * self._block_size
        most = self._layout(max_rows)
        num_blocks = max_rows * -(-max_context_tokens // self._block_size)
        size = len(attention.windows) * most.window_size + num_blocks
        self._arrays = torch.zeros(size, dtype=torch.int32, device=attention.device)
        self._parts = attention.new_parts(most.num_items, 0)

    def __repr__(self) -> str:
        """Show the size."""
        return f"StaticDecode({self._arrays.nbytes} bytes)"

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._attention.device

    @property
    def num_bytes(self) -> int:
        """On the device."""
        return self._arrays.nbytes + self._parts.found.nbytes + self._parts.sums.nbytes

    def step(self, num_rows: int, slot_mapping: SlotMapping) -> TritonStep:
        """Return the step of a size, to be captured. slot_mapping: [num_rows], at fixed places."""
        of, at = self._layout(num_rows), 0
        pieces = []
        for _ in self._attention.windows:
            counts, items, joins = self._arrays[at : at + of.window_size].split(
                [_NUM_COUNTS, NUM_ITEM_FIELDS * of.num_items, NUM_JOIN_FIELDS * of.num_rows]
            )
            pieces.append(
                Pieces(
                    items.view(NUM_ITEM_FIELDS, -1),
                    joins.view(NUM_JOIN_FIELDS, -1),
                    counts,
                    self._attention.decode_tile,
                )
            )
            at += of.window_size
        return TritonStep(
            self._attention, (tuple(pieces),), self._arrays[at:], slot_mapping, self._parts
        )

    def fill_empty(self, num_rows: int) -> None:
        """Lay out a step without rows: all are padding."""
        size = len(self._attention.windows) * self._layout(num_rows).window_size
        self._arrays[:size] = 0

    def fill(self, num_rows: int, starts: Ints, tables: list[Ints]) -> bool:
        """Lay out one step of at most `num_rows` decode rows; False: there is no room for it.

        starts: position of each row's token. tables: each row's blocks up to it.
        """
        of = self._layout(num_rows)
        lengths = np.array([len(table) for table in tables])
        table_at = np.cumsum(lengths) - lengths
        ones = np.ones_like(starts)
        rows = Rows(np.arange(len(starts)), starts, ones, table_at)
        cuts = self._attention.cut_rows(rows, is_decode=True)
        end = len(cuts) * of.window_size + int(lengths.sum())
        if end > len(self._arrays) or any(it.items.shape[1] > of.num_items for it in cuts):
            return False
        staged = pinned_int32(end, self._attention.device)
        arrays, at = staged.numpy(), 0
        for it in cuts:
            num_items, num_joins = it.items.shape[1], it.joins.shape[1]
            arrays[at : at + _NUM_COUNTS] = num_items, num_joins
            at += _NUM_COUNTS
            items = arrays[at : at + NUM_ITEM_FIELDS * of.num_items]
            items.reshape(NUM_ITEM_FIELDS, -1)[:, :num_items] = it.items
            at += items.size
            joins = arrays[at : at + NUM_JOIN_FIELDS * of.num_rows]
            joins.reshape(NUM_JOIN_FIELDS, -1)[:, :num_joins] = it.joins
            at += joins.size
        arrays[at:] = np.concatenate(tables)
        self._copy(staged)
        return True

    def _copy(self, staged: Tensor) -> None:
        self._arrays[: len(staged)].copy_(staged, non_blocking=True)

    def _layout(self, num_rows: int) -> _Layout:
        # What the cache holds bounds the splits, unless many rows share long prefixes.
        num_items = self._num_cached_tokens // tiles.MIN_DECODE_SPLIT + num_rows
        return _Layout(num_rows, min(tiles.MAX_PARTS * num_rows, num_items))
