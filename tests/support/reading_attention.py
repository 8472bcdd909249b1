"""Attention for layers that store keys and values themselves: slow, obvious, in plain torch.

Each row gathers its blocks and attends in float32. Rows of padding get zeros.
"""

import torch
from torch import Tensor

from rillgate_server.worker.attention.base import PackedRow, PackedStep
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.layer_cache import LayerCache, SlotMapping


class GatheringAttention:
    """A backend (AttentionBackend)."""

    def __init__(self, storage: KVStorage) -> None:
        """Attend over a storage."""
        self._storage = storage

    def prepare(self, step: PackedStep) -> "GatheringStep":
        """Keep the step."""
        return GatheringStep(self._storage, step)


class GatheringStep:
    """One step's attention (ReadingStep)."""

    def __init__(self, storage: KVStorage, step: PackedStep) -> None:
        """Use `GatheringAttention.prepare`."""
        self._storage = storage
        self._step = step

    @property
    def slot_mapping(self) -> SlotMapping:
        """Return the step's."""
        return self._step.slot_mapping

    def cache(self, layer_index: int) -> LayerCache:
        """Return a layer's."""
        return self._storage.layers[layer_index]

    def read(self, layer_index: int, query: Tensor, scaling: float) -> Tensor:
        """Attend row by row."""
        window = self._storage.layout.layers[layer_index].window_tokens
        cache = self._storage.layers[layer_index]
        output = torch.zeros_like(query)
        for row in self._step.rows:
            own = slice(row.offset, row.offset + row.num_tokens)
            output[own] = self._attend(row, cache, query[own].float() * scaling, window)
        return output

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Store, then read."""
        self.cache(layer_index).write(self.slot_mapping, key.transpose(0, 1), value.transpose(0, 1))
        return self.read(layer_index, query.transpose(0, 1), scaling)

    def _attend(
        self, row: PackedRow, cache: LayerCache, query: Tensor, window: int | None
    ) -> Tensor:
        """Attend for one row. query: [num_tokens, num_heads, dim], scaled."""
        end = row.start + row.num_tokens
        num_blocks = -(-end // self._storage.layout.block_size_tokens)
        blocks = row.block_table[:num_blocks].to(query.device)
        groups = query.shape[1] // cache.keys.shape_per_token[0]
        keys, values = (
            it.gather(blocks, torch.float32)[:end].repeat_interleave(groups, dim=1)
            for it in (cache.keys, cache.values)
        )
        scores = torch.einsum("qhd,khd->hqk", query, keys)
        positions = torch.arange(end, device=query.device)
        distance = positions[row.start :, None] - positions
        is_hidden = distance < 0
        if window is not None:
            is_hidden |= distance >= window
        weights = scores.masked_fill(is_hidden, -torch.inf).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, values)
