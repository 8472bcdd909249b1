"""Attention of all rows straight over their blocks, by the C++ kernels: nothing is gathered.

Owns what a step looks like to the kernels. Needs a model in bf16, and a cache in bf16 or INT8; a
token's numbers hang on its own context alone (kernels/attention.cpp).
"""

import torch
from torch import Tensor

from rillgate_server.core.model_spec import INT8, KVLayout
from rillgate_server.worker.attention.base import AttentionStep, PackedStep
from rillgate_server.worker.kernels.library import (
    Cache,
    Heads,
    Kernels,
    NewTokens,
    Rows,
    Vectors,
)
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.layer_cache import CachedVectors, Int8Vectors

_MULTIPLES = {"key": 32, "value": 16}
"""Of heads' dimensions that the kernel's vectors hold."""


def can_attend(layout: KVLayout, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels can read this cache, for a model of `dtype`."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and layout.kv_dtype in ("bfloat16", INT8)
        and all(
            segment.shape_per_token[-1] % _MULTIPLES.get(segment.name, 1) == 0
            for layer in layout.layers
            for segment in layer.segments
        )
    )


class PagedAttention:
    """The backend: holds the storage (AttentionBackend). State: none; keeps addresses of it."""

    def __init__(self, storage: KVStorage, kernels: Kernels) -> None:
        """Attend over a storage for which `can_attend` holds."""
        self._storage = storage
        self._kernels = kernels
        block_size = storage.layout.block_size_tokens
        self._caches = tuple(
            Cache(
                _describe(layer.keys),
                _describe(layer.values),
                block_size,
                layer.keys.shape_per_token[0],
            )
            for layer in storage.layers
        )

    def prepare(self, step: PackedStep) -> AttentionStep:
        """Describe the rows once for each distinct window."""
        layers = self._storage.layout.layers
        of = torch.tensor(
            [
                [row.offset for row in step.rows],
                [row.start for row in step.rows],
                [row.num_tokens for row in step.rows],
                [row.block_table.data_ptr() for row in step.rows],
            ]
        )
        addresses = [it.data_ptr() for it in of]
        rows = {
            window: Rows(*addresses, len(step.rows), window or 0)
            for window in {layer.window_tokens for layer in layers}
        }
        per_layer = tuple(rows[layer.window_tokens] for layer in layers)
        return _PagedStep(self._kernels, self._caches, per_layer, (of, step))


class _PagedStep:
    """One step's attention (AttentionStep). Keeps what its addresses refer to."""

    def __init__(
        self,
        kernels: Kernels,
        caches: tuple[Cache, ...],
        rows: tuple[Rows, ...],
        kept: tuple[Tensor, PackedStep],
    ) -> None:
        self._kernels = kernels
        self._caches = caches
        self._rows = rows
        self._kept = kept
        self._slots = tuple(it.contiguous() for it in kept[1].slot_mapping)

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Store, then attend (AttentionStep.attend)."""
        key, value = key.contiguous(), value.contiguous()
        heads = Heads(len(query), len(key), key.shape[-1], value.shape[-1], scaling)
        addresses = (it.data_ptr() for it in (key, value, *self._slots))
        new = NewTokens(*addresses, query.shape[1])
        return self._kernels.attend(
            heads, self._caches[layer_index], new, self._rows[layer_index], query
        )


def _describe(vectors: CachedVectors) -> Vectors:
    """Say where a layer's keys or values lie."""
    tokens, dim = vectors.tokens, vectors.shape_per_token[-1]
    if isinstance(vectors, Int8Vectors):
        scales = vectors.scales
        return Vectors(
            tokens.data_ptr(), scales.data_ptr(), tokens.stride(0), scales.stride(0), dim
        )
    return Vectors(tokens.data_ptr(), None, tokens.stride(0), 0, dim)
