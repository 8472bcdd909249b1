"""Attention of decode rows straight over their blocks, by the C++ kernels: nothing is gathered.

Owns what a step's rows of one window look like to the kernel. Needs bf16 in cache and model; each
row is computed as if it were alone (kernels/attention.cpp).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rillgate_server.core.model_spec import KVLayout
from rillgate_server.worker.attention.base import PackedRow
from rillgate_server.worker.kernels.library import Cache, DecodeRows, Heads, Kernels
from rillgate_server.worker.layer_cache import LayerCache

_KEY_MULTIPLE, _VALUE_MULTIPLE = 32, 16
"""Of heads' dimensions that the kernel's vectors hold."""


def can_attend(layout: KVLayout, device: torch.device) -> bool:
    """Whether the kernels can read this cache."""
    dims = [
        (segment.name, segment.shape_per_token[-1])
        for layer in layout.layers
        for segment in layer.segments
    ]
    return (
        device.type == "cpu"
        and layout.kv_dtype == "bfloat16"
        and all(
            dim % (_KEY_MULTIPLE if name == "key" else _VALUE_MULTIPLE) == 0 for name, dim in dims
        )
    )


class PagedDecode:
    """A step's decode rows in layers of one window. State: none; keeps what addresses refer to."""

    def __init__(
        self, kernels: Kernels, rows: Sequence[PackedRow], window: int | None, block_size: int
    ) -> None:
        """Describe the rows."""
        self._kernels = kernels
        self._block_size = block_size
        self._kept = torch.tensor(
            [
                [row.offset for row in rows],
                [row.start for row in rows],
                [row.block_table.data_ptr() for row in rows],
            ]
        )
        self._rows = DecodeRows(*(it.data_ptr() for it in self._kept), len(rows), window or 0)

    def attend(self, cache: LayerCache, query: Tensor, scaling: float, output: Tensor) -> None:
        """Fill the rows' tokens of output [num_tokens, num_heads, value_dim], bf16.

        query: [num_heads, num_tokens, key_dim], bf16.
        """
        num_kv_heads, key_dim = cache.keys.shape_per_token
        value_dim = cache.values.shape_per_token[1]
        keys, values = cache.keys.tokens, cache.values.tokens
        strides = keys.stride(0), values.stride(0)
        of = Cache(keys.data_ptr(), values.data_ptr(), *strides, self._block_size)
        heads = Heads(len(query), num_kv_heads, key_dim, value_dim, scaling)
        self._kernels.attend_decode(heads, of, self._rows, query, output)
