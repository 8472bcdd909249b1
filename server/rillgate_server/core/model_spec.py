"""What the control plane knows of a model, and where each thing lies in a cache block.

Read by the scheduler's limits, the memory report and the worker's storage alike, so that they
cannot disagree. Does not know tensors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rillgate_server.errors import ConfigError

SEGMENT_ALIGNMENT_BYTES = 256
"""Keys and values start at multiples of this: a warp's vector load on a GPU, four cache lines."""
SCALE_ALIGNMENT_BYTES = 16
"""Scales start at multiples of this, one thread's vector load: aligned like keys and values, those
of two heads of 32 would take 256 bytes per layer where they fill 64."""

INT8 = "int8"
"""The cache type that keeps scales beside keys and values."""

_SCALE_DTYPE = "bfloat16"  # why: worker.layer_cache

NO_QUANTIZATION = "none"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, INT8: 1}
"""Element sizes of the types that a cache may hold."""


@dataclass(frozen=True, slots=True)
class KVSegment:
    """One array of one layer inside a block: `[block_size_tokens, *shape_per_token]`."""

    name: str
    """`key` or `value`; in INT8 also `key_scale` and `value_scale`."""
    dtype: str
    """A key of DTYPE_BYTES."""
    shape_per_token: tuple[int, ...]
    """`(num_kv_heads, head_dim)`; of scales `(num_kv_heads,)`."""
    offset_bytes: int
    """From the block's start."""


@dataclass(frozen=True, slots=True)
class LayerKV:
    """What one layer keeps."""

    segments: tuple[KVSegment, ...]
    window_tokens: int | None = None
    """Attends to this many tokens, itself included; None = all."""


@dataclass(frozen=True, slots=True)
class KVLayout:
    """A block of the cache: storage is `[num_blocks, block_bytes]` (contracts, section 6).

    | layer 0 key | layer 0 value | layer 1 key | ... | layer 0 key_scale | layer 0 value_scale |...
    at multiples of SEGMENT_ALIGNMENT_BYTES             INT8 alone; of SCALE_ALIGNMENT_BYTES
    """

    block_size_tokens: int
    block_bytes: int
    kv_dtype: str
    """Of keys and values: a key of DTYPE_BYTES."""
    layers: tuple[LayerKV, ...]

    @classmethod
    def build(
        cls,
        block_size_tokens: int,
        kv_dtype: str,
        layers: tuple[tuple[tuple[int, ...], tuple[int, ...], int | None], ...],
    ) -> "KVLayout":
        """Lay out blocks for layers of (key shape per token, value shape per token, window)."""
        end = 0

        def place(name: str, dtype: str, shape: tuple[int, ...], alignment: int) -> KVSegment:
            nonlocal end
            offset = _aligned(end, alignment)
            end = offset + block_size_tokens * math.prod(shape) * DTYPE_BYTES[dtype]
            return KVSegment(name, dtype, shape, offset)

        vectors = [
            (
                place("key", kv_dtype, key_shape, SEGMENT_ALIGNMENT_BYTES),
                place("value", kv_dtype, value_shape, SEGMENT_ALIGNMENT_BYTES),
            )
            for key_shape, value_shape, _ in layers
        ]
        scales = [
            (
                place("key_scale", _SCALE_DTYPE, key_shape[:-1], SCALE_ALIGNMENT_BYTES),
                place("value_scale", _SCALE_DTYPE, value_shape[:-1], SCALE_ALIGNMENT_BYTES),
            )
            if kv_dtype == INT8
            else ()
            for key_shape, value_shape, _ in layers
        ]
        laid = tuple(
            LayerKV((*own, *own_scales), window)
            for own, own_scales, (_, _, window) in zip(vectors, scales, layers, strict=True)
        )
        return cls(block_size_tokens, _aligned(end, SEGMENT_ALIGNMENT_BYTES), kv_dtype, laid)


def _aligned(offset_bytes: int, alignment_bytes: int) -> int:
    """Round up to the alignment."""
    return -(-offset_bytes // alignment_bytes) * alignment_bytes


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """What a cache's tiers may take, once the weights are loaded."""

    device_bytes: int
    host_bytes: int
    is_shared: bool
    """Device and host are the same memory: a replica on CPUs."""
    is_measured: bool = False
    """What the largest step takes of the device's memory was measured, and is taken off."""

    def least(self, others: Sequence["FreeMemory"]) -> "FreeMemory":
        """Return what all have, where each keeps a part of every block."""
        return FreeMemory(
            min(it.device_bytes for it in (self, *others)),
            min(it.host_bytes for it in (self, *others)),
            self.is_shared,
            self.is_measured,
        )


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """The cache that a replica has: what the control plane needs to know of its storage."""

    num_device_blocks: int
    block_bytes: int
    """Of one block, in either tier."""
    kv_dtype: str
    """Of keys and values in it: the model's, or int8."""
    num_host_blocks: int = 0
    """0: no host tier."""
    num_pageable_host_blocks: int = 0
    """Those of them that a GPU copies slowly, for their memory could not be pinned."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What everybody but the worker needs to know of a checkpoint."""

    name: str
    """What callers ask for."""
    version_digest: str
    """Hex digest of the checkpoint, and how its weights are quantised; names the version."""
    tokenizer_digest: str
    """Hex digest of tokenizer.json; empty when the checkpoint has none."""
    architecture: str
    """`Qwen2ForCausalLM`, …"""
    vocab_size: int
    """Rows of the output head: sampled ids are below this."""
    max_context_tokens: int
    """Prompt and answer together."""
    eos_token_ids: tuple[int, ...]
    """The model's own ends of sequence."""
    dtype: str
    """Of the weights and of the computation."""
    quantization: str = NO_QUANTIZATION
    """How the layers' weights are held: a core.quantization.Quantization.version."""

    def with_quantization(self, name: str) -> "ModelSpec":
        """Return it as another version where the weights are quantised: it gives other tokens."""
        if name == NO_QUANTIZATION:
            return self
        digest = f"{self.version_digest}-{name}"
        return replace(self, version_digest=digest, quantization=name)

    def with_context_of(self, max_context_tokens: int) -> "ModelSpec":
        """Return it with a shorter context, 0: with its own; raises ConfigError for a longer."""
        if max_context_tokens > self.max_context_tokens:
            raise ConfigError(
                f"model.max_context_tokens is {max_context_tokens}; allowed: 0 to the "
                f"checkpoint's {self.max_context_tokens}"
            )
        return replace(self, max_context_tokens=max_context_tokens or self.max_context_tokens)
