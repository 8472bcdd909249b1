"""The layout of a cache block: segments fit, do not overlap, start aligned, and INT8 is half."""

import math
from itertools import pairwise

import pytest

from rillgate_server.core.model_spec import (
    DTYPE_BYTES,
    INT8,
    SCALE_ALIGNMENT_BYTES,
    SEGMENT_ALIGNMENT_BYTES,
    KVLayout,
    ModelSpec,
)
from rillgate_server.errors import ConfigError

Layers = tuple[tuple[tuple[int, ...], tuple[int, ...], int | None], ...]

ODD_LAYERS: Layers = (
    ((2, 24), (2, 16), None),
    ((3, 5), (3, 3), 8),
    ((1, 5), (1, 3), None),
)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", INT8])
@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_segments_lie_behind_one_another_aligned_and_inside_the_block(
    kv_dtype: str, block_size: int
) -> None:
    """Keys and values at multiples of 256 bytes, scales of 16; nothing overlaps."""
    layout = KVLayout.build(block_size, kv_dtype, ODD_LAYERS)
    assert (layout.kv_dtype, layout.block_size_tokens) == (kv_dtype, block_size)
    assert layout.block_bytes % SEGMENT_ALIGNMENT_BYTES == 0
    spans = []
    for layer in layout.layers:
        for segment in layer.segments:
            is_scale = segment.name.endswith("_scale")
            alignment = SCALE_ALIGNMENT_BYTES if is_scale else SEGMENT_ALIGNMENT_BYTES
            assert segment.offset_bytes % alignment == 0
            size = block_size * math.prod(segment.shape_per_token) * DTYPE_BYTES[segment.dtype]
            spans.append((segment.offset_bytes, segment.offset_bytes + size))
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] <= layout.block_bytes
    assert layout.block_bytes - spans[-1][1] < SEGMENT_ALIGNMENT_BYTES


def test_int8_adds_a_scale_per_token_and_head() -> None:
    """Beside each layer's keys and values, and nothing of the kind in the model's own type."""
    exact = KVLayout.build(16, "bfloat16", ODD_LAYERS)
    small = KVLayout.build(16, INT8, ODD_LAYERS)
    for layer, (key_shape, value_shape, window) in zip(small.layers, ODD_LAYERS, strict=True):
        assert layer.window_tokens == window
        assert [(s.name, s.dtype, s.shape_per_token) for s in layer.segments] == [
            ("key", "int8", key_shape),
            ("value", "int8", value_shape),
            ("key_scale", "bfloat16", key_shape[:-1]),
            ("value_scale", "bfloat16", value_shape[:-1]),
        ]
    assert [[s.name for s in layer.segments] for layer in exact.layers] == [["key", "value"]] * 3


@pytest.mark.parametrize(
    ("num_layers", "key_shape", "value_shape"),
    [
        (6, (2, 32), (2, 32)),
        (24, (2, 64), (2, 64)),
        (32, (8, 128), (8, 128)),
        (4, (16, 192), (16, 128)),
    ],
)
def test_int8_takes_half_the_bytes_and_two_per_token_and_head(
    num_layers: int, key_shape: tuple[int, ...], value_shape: tuple[int, ...]
) -> None:
    """At the default block size alignment adds less than 256 bytes per block, not per layer."""
    layers: Layers = ((key_shape, value_shape, None),) * num_layers
    exact = KVLayout.build(16, "bfloat16", layers).block_bytes
    small = KVLayout.build(16, INT8, layers).block_bytes
    scales = num_layers * 16 * (key_shape[0] + value_shape[0]) * 2
    assert 0 <= small - (exact // 2 + scales) < SEGMENT_ALIGNMENT_BYTES


def test_a_shorter_context_than_the_checkpoint_s_may_be_served() -> None:
    """0 leaves it; a longer one than the model was made for is refused with both numbers."""
    spec = ModelSpec("m", "", "", "LlamaForCausalLM", 100, 2048, (), "float32")
    assert spec.with_context_of(0) == spec.with_context_of(2048) == spec
    assert spec.with_context_of(256).max_context_tokens == 256
    with pytest.raises(ConfigError, match=r"max_context_tokens is 2049; allowed: 0 to .* 2048"):
        spec.with_context_of(2049)
