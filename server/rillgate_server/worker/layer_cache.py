"""One layer's keys and values, as views of the cache's bytes: written per token, read per block.

Owns how a vector is kept: as it is, or in INT8 with a scale per token and head. Does not know who
reserves the bytes (worker.kv_storage), which block belongs to whom, nor attention.

    a view:   [num_blocks, elements of one segment], block_bytes apart
    INT8:     vector of one token and head  ~  scale * integers in [-127, 127]

The scale is the vector's largest magnitude / 127, rounded to bfloat16, which has float32's range:
float16 would overflow or vanish where keys are very large or small, float32 would add an eighth
to heads of 32. The integers are taken with the rounded scale, so its rounding (2^-9, which makes
the largest of them 127.25 at most) costs nothing: no element is off by more than half a scale.

What is not finite makes the scale NaN or infinite, and comes back as NaN: the request fails as it
would without INT8. A block of zero bytes holds zeros.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rillgate_server.core.model_spec import DTYPE_BYTES, KVLayout, KVSegment, LayerKV

SlotMapping = tuple[Tensor, Tensor]
"""Where tokens go: (block [num_tokens], offset in it [num_tokens]), int64."""

_MAX_INT8 = 127
"""-128 stays unused: the range is symmetric, so that a vector and its negative are kept alike."""


@dataclass(frozen=True, slots=True)
class ExactVectors:
    """All blocks' keys, or all blocks' values, of one layer, in the model's type."""

    shape_per_token: tuple[int, ...]
    """(num_kv_heads, dim)."""
    tokens: Tensor
    """[num_blocks, block_size_tokens, num_kv_heads, dim], strided."""
    blocks: Tensor
    """The same as [num_blocks, elements]: rows that are contiguous gather ten times faster."""

    def write(self, slot_mapping: SlotMapping, vectors: Tensor) -> None:
        """Store new tokens' vectors. [num_tokens, num_kv_heads, dim], model dtype."""
        self.tokens[slot_mapping] = vectors

    def gather(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy blocks out, in order, as `dtype`.

        blocks: [num_blocks], int64. Returns [num_blocks * block_size_tokens, num_kv_heads, dim].
        """
        return self.blocks.index_select(0, blocks).view(-1, *self.shape_per_token).to(dtype)


@dataclass(frozen=True, slots=True)
class Int8Vectors:
    """The same in INT8, with a scale per token and head."""

    shape_per_token: tuple[int, ...]
    """(num_kv_heads, dim)."""
    tokens: Tensor
    """[num_blocks, block_size_tokens, num_kv_heads, dim], int8, strided."""
    blocks: Tensor
    """The same as [num_blocks, elements]."""
    scales: Tensor
    """[num_blocks, block_size_tokens, num_kv_heads], bfloat16, strided."""
    scale_blocks: Tensor
    """The same as [num_blocks, elements]."""

    def write(self, slot_mapping: SlotMapping, vectors: Tensor) -> None:
        """Store new tokens' vectors. [num_tokens, num_kv_heads, dim], model dtype."""
        integers, scales = quantize(vectors)
        self.tokens[slot_mapping] = integers
        self.scales[slot_mapping] = scales

    def gather(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy blocks out, in order, multiplied by their scales in float32, then as `dtype`.

        blocks: [num_blocks], int64. Returns [num_blocks * block_size_tokens, num_kv_heads, dim].
        """
        integers = self.blocks.index_select(0, blocks).view(-1, *self.shape_per_token)
        scales = self.scale_blocks.index_select(0, blocks).view(*integers.shape[:-1], 1)
        return integers.float().mul_(scales.float()).to(dtype)


CachedVectors = ExactVectors | Int8Vectors


def quantize(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors [..., dim] as integers [..., dim], int8, and scales [...], bfloat16."""
    exact = vectors.float()
    scales = (exact.abs().amax(dim=-1) / _MAX_INT8).to(torch.bfloat16)
    # A vector of zeros divides 0 by 0; one of the smallest float32s may divide by 0 or pass 127.
    integers = exact.div(scales[..., None].float()).round_().nan_to_num_(nan=0.0)
    return integers.clamp_(-_MAX_INT8, _MAX_INT8).to(torch.int8), scales


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values."""

    keys: CachedVectors
    values: CachedVectors

    def write(self, slot_mapping: SlotMapping, keys: Tensor, values: Tensor) -> None:
        """Store new tokens. keys, values: [num_tokens, num_kv_heads, dim], model dtype."""
        self.keys.write(slot_mapping, keys)
        self.values.write(slot_mapping, values)

    def clear(self, slot_mapping: SlotMapping) -> None:
        """Zero what tokens have left."""
        for vectors in (self.keys, self.values):
            vectors.tokens[slot_mapping] = 0
            if isinstance(vectors, Int8Vectors):
                vectors.scales[slot_mapping] = 0


def view_layer(storage: Tensor, layout: KVLayout, layer: LayerKV) -> LayerCache:
    """View one layer of the cache. storage: [num_blocks, block_bytes], uint8."""
    segments = {segment.name: segment for segment in layer.segments}

    def vectors(name: str) -> CachedVectors:
        of = segments[name]
        own = _tokens(storage, layout, of), _blocks(storage, layout, of)
        scale = segments.get(f"{name}_scale")
        if scale is None:
            return ExactVectors(of.shape_per_token, *own)
        scales = _tokens(storage, layout, scale), _blocks(storage, layout, scale)
        return Int8Vectors(of.shape_per_token, *own, *scales)

    return LayerCache(vectors("key"), vectors("value"))


def _tokens(storage: Tensor, layout: KVLayout, segment: KVSegment) -> Tensor:
    """View one segment as [num_blocks, block_size_tokens, *shape_per_token]."""
    shape = (layout.block_size_tokens, *segment.shape_per_token)
    tokens: Tensor = _blocks(storage, layout, segment).unflatten(1, shape)
    return tokens


def _blocks(storage: Tensor, layout: KVLayout, segment: KVSegment) -> Tensor:
    """View one segment as [num_blocks, elements]."""
    num_elements = layout.block_size_tokens * math.prod(segment.shape_per_token)
    end = segment.offset_bytes + num_elements * DTYPE_BYTES[segment.dtype]
    dtype: torch.dtype = getattr(torch, segment.dtype)
    return storage[:, segment.offset_bytes : end].view(dtype)
