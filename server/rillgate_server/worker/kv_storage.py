"""The cache's bytes: one tensor `[num_blocks, block_bytes]`, and views of it per layer.

Owns the storage and the views. Does not know which block belongs to whom: block numbers come with
each plan, and what is free or shared is decided elsewhere.

    one block:  | layer 0 key | layer 0 value | layer 1 key | ...      (KVLayout's offsets)
    a view:     [num_blocks, elements of one segment], block_bytes apart
"""

import math
from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import torch
from torch import Tensor

from rillgate_server.core.model_spec import DTYPE_BYTES, KVLayout, KVSegment
from rillgate_server.errors import OutOfMemory
from rillgate_server.worker.host_memory import available_bytes


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values, as views of the storage."""

    keys: Tensor
    """[num_blocks, block_size_tokens, num_kv_heads, key_dim], strided."""
    values: Tensor
    """[num_blocks, block_size_tokens, num_kv_heads, value_dim], strided."""
    key_blocks: Tensor
    """The same keys as [num_blocks, elements]: rows that are contiguous gather ten times faster."""
    value_blocks: Tensor
    """The same values as [num_blocks, elements]."""

    def write(self, slot_mapping: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> None:
        """Store new tokens: (block [num_tokens], offset in it [num_tokens]), int64."""
        self.keys[slot_mapping] = keys
        self.values[slot_mapping] = values


class KVStorage:
    """The device tier's memory.

    State: the bytes alone. Starts as zeros, and `clear` zeroes blocks before they are filled
    anew: what lies past a row's end is masked, but a NaN of a failed request would come through
    the mask as 0 * NaN and end its neighbours.
    """

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        """Reserve the memory (the system hands pages out as they are touched)."""
        needed_bytes, free_bytes = num_blocks * layout.block_bytes, available_bytes()
        if needed_bytes > free_bytes:
            raise OutOfMemory(f"a cache of {num_blocks} blocks", needed_bytes, free_bytes)
        self.layout = layout
        self.num_blocks = num_blocks
        # torch.zeros would write every page at once: seconds, and memory that nobody may ever use.
        pages = mmap(-1, needed_bytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        self._bytes = torch.frombuffer(pages, dtype=torch.uint8).view(num_blocks, -1)
        self.layers = tuple(
            LayerCache(
                self._tokens(layer.segments[0]),
                self._tokens(layer.segments[1]),
                self._blocks(layer.segments[0]),
                self._blocks(layer.segments[1]),
            )
            for layer in layout.layers
        )

    def __repr__(self) -> str:
        """Show the size."""
        return f"KVStorage(num_blocks={self.num_blocks}, block_bytes={self.layout.block_bytes})"

    def clear(self, blocks: list[int]) -> None:
        """Zero whole blocks."""
        for block in blocks:
            self._bytes[block].zero_()

    def _tokens(self, segment: KVSegment) -> Tensor:
        size = self.layout.block_size_tokens
        tokens: Tensor = self._blocks(segment).unflatten(1, (size, *segment.shape_per_token))
        return tokens

    def _blocks(self, segment: KVSegment) -> Tensor:
        """View one segment as [num_blocks, elements]."""
        num_elements = self.layout.block_size_tokens * math.prod(segment.shape_per_token)
        end = segment.offset_bytes + num_elements * DTYPE_BYTES[segment.dtype]
        dtype: torch.dtype = getattr(torch, segment.dtype)
        return self._bytes[:, segment.offset_bytes : end].view(dtype)
