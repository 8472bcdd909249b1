"""What the control plane knows of a model, and where each thing lies in a cache block.

Read by the scheduler's limits, the memory report and the worker's storage alike, so that they
cannot disagree. Does not know tensors.
"""

from dataclasses import dataclass

SEGMENT_ALIGNMENT_BYTES = 256
"""Segments start at multiples of this: the widest vector load of a GPU, and four cache lines."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Element sizes of the types that a cache may hold."""


@dataclass(frozen=True, slots=True)
class KVSegment:
    """One array of one layer inside a block: `[block_size_tokens, *shape_per_token]`."""

    name: str
    """`key` or `value`."""
    dtype: str
    """A key of DTYPE_BYTES."""
    shape_per_token: tuple[int, ...]
    """`(num_kv_heads, head_dim)`."""
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
    """A block of the cache: storage is `[num_blocks, block_bytes]` (contracts, section 6)."""

    block_size_tokens: int
    block_bytes: int
    layers: tuple[LayerKV, ...]

    @classmethod
    def build(
        cls,
        block_size_tokens: int,
        dtype: str,
        layers: tuple[tuple[tuple[int, ...], tuple[int, ...], int | None], ...],
    ) -> "KVLayout":
        """Lay out blocks for layers of (key shape per token, value shape per token, window)."""
        offset = 0
        laid: list[LayerKV] = []
        for key_shape, value_shape, window in layers:
            segments: list[KVSegment] = []
            for name, shape in (("key", key_shape), ("value", value_shape)):
                segments.append(KVSegment(name, dtype, shape, offset))
                num_elements = block_size_tokens
                for size in shape:
                    num_elements *= size
                offset = _aligned(offset + num_elements * DTYPE_BYTES[dtype])
            laid.append(LayerKV(tuple(segments), window))
        return cls(block_size_tokens, offset, tuple(laid))


def _aligned(offset_bytes: int) -> int:
    """Round up to the segment alignment."""
    return -(-offset_bytes // SEGMENT_ALIGNMENT_BYTES) * SEGMENT_ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What everybody but the worker needs to know of a checkpoint."""

    name: str
    """What callers ask for."""
    version_digest: str
    """Hex digest of the checkpoint; names the version."""
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
