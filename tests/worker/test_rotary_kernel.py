"""Heads rotated and stored, here in Triton's interpreter: what plain torch and the cache make."""

from functools import partial

import pytest
import torch
from torch import Tensor

from rillgate_server.core.model_spec import KVLayout
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.layer_cache import Int8Vectors, LayerCache, SlotMapping, quantize
from rillgate_server.worker.network.rotary_kernel import HeadNorms, HeadShape, rotate_and_store

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE, NUM_BLOCKS = 4, 12
ROUNDINGS = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""What one rounding may differ by, relatively; the interpreter cuts bf16 where hardware rounds."""
SHAPES = (HeadShape(4, 2, 16), HeadShape(3, 1, 24), HeadShape(7, 1, 128), HeadShape(2, 2, 6))
EPSILON = 1e-6


def make_storage(heads: HeadShape, kv_dtype: str) -> KVStorage:
    """Reserve a cache of two layers, of which the tests use the second."""
    shape = heads.num_kv_heads, heads.dim
    layout = KVLayout.build(BLOCK_SIZE, kv_dtype, ((shape, shape, None),) * 2)
    return KVStorage(layout, NUM_BLOCKS, device=DEVICE)


def name_of(dtype: torch.dtype) -> str:
    """Return a type's name in a layout."""
    return str(dtype).removeprefix("torch.")


def make_inputs(
    num_tokens: int, heads: HeadShape, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, Tensor], SlotMapping]:
    """Return a joined product, angles and where tokens go, no two to the same place."""
    torch.manual_seed(num_tokens)
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.dim
    qkv = (torch.randn(num_tokens, width) * 3).to(dtype)
    half = torch.randn(num_tokens, heads.dim // 2)
    angles = torch.cat([half, half], dim=1)
    places = torch.randperm(BLOCK_SIZE * NUM_BLOCKS)[:num_tokens]
    return (
        qkv.to(DEVICE),
        (angles.cos().to(DEVICE), angles.sin().to(DEVICE)),
        ((places // BLOCK_SIZE).to(DEVICE), (places % BLOCK_SIZE).to(DEVICE)),
    )


def split_heads(qkv: Tensor, heads: HeadShape) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values. [num_tokens, heads, dim]."""
    sizes = [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads]
    query, key, value = qkv.unflatten(1, (-1, heads.dim)).split(sizes, dim=1)
    return query, key, value


def rotated(x: Tensor, angles: tuple[Tensor, Tensor], norm: Tensor | None) -> Tensor:
    """Norm and rotate heads [num_tokens, heads, dim] in float32."""
    exact = x.float()
    if norm is not None:
        exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + EPSILON) * norm.float()
    first, second = exact.chunk(2, dim=-1)
    cosines, sines = (it[:, None].chunk(2, dim=-1)[0] for it in angles)
    turned = first * cosines - second * sines, second * cosines + first * sines
    return torch.cat(turned, dim=-1).to(x.dtype)


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("dtype", list(ROUNDINGS))
@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("num_tokens", [1, 19])
def test_queries_come_back_rotated_and_keys_and_values_lie_where_they_belong(
    num_tokens: int, heads: HeadShape, dtype: torch.dtype, has_norms: bool
) -> None:
    """With norms of heads and without; nothing else of the cache is touched."""
    qkv, angles, slots = make_inputs(num_tokens, heads, dtype)
    weights = [(torch.randn(heads.dim) + 1).to(DEVICE, dtype) for _ in range(2)]
    norms = HeadNorms(weights[0], weights[1], EPSILON) if has_norms else None
    storage, expected = (make_storage(heads, name_of(dtype)) for _ in range(2))
    got = rotate_and_store(qkv, angles, heads, norms, slots, storage.layers[1])
    query, key, value = split_heads(qkv, heads)
    query_norm, key_norm = weights if has_norms else (None, None)
    near = partial(torch.testing.assert_close, rtol=ROUNDINGS[dtype], atol=2 * ROUNDINGS[dtype])
    near(got, rotated(query, angles, query_norm))
    expected.layers[1].write(slots, rotated(key, angles, key_norm), value)
    for ours, theirs in zip(storage.layers, expected.layers, strict=True):
        near(ours.keys.tokens, theirs.keys.tokens)
        assert torch.equal(ours.values.tokens, theirs.values.tokens)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_padding_is_stored_nowhere(kv_dtype: str) -> None:
    """A token whose block is -1 leaves the cache alone, and its neighbours get what they get."""
    heads = HeadShape(4, 2, 16)
    qkv, angles, (blocks, offsets) = make_inputs(8, heads, torch.float32)
    qkv[5:] = torch.nan
    padded, alone = (make_storage(heads, kv_dtype) for _ in range(2))
    blocks[5:], offsets[5:] = -1, 0
    got = rotate_and_store(qkv, angles, heads, None, (blocks, offsets), padded.layers[1])
    short = rotate_and_store(
        qkv[:5],
        (angles[0][:5], angles[1][:5]),
        heads,
        None,
        (blocks[:5], offsets[:5]),
        alone.layers[1],
    )
    assert torch.equal(got[:5], short)
    assert torch.equal(padded.bytes, alone.bytes)


def stored(cache: LayerCache, slots: SlotMapping) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return (integers, scales) of keys and of values."""
    assert isinstance(cache.keys, Int8Vectors)
    assert isinstance(cache.values, Int8Vectors)
    return tuple((it.tokens[slots], it.scales[slots]) for it in (cache.keys, cache.values))


@pytest.mark.parametrize("dtype", list(ROUNDINGS))
@pytest.mark.parametrize("heads", SHAPES)
def test_int8_gets_what_the_definition_makes_of_the_rounded_vectors(
    heads: HeadShape, dtype: torch.dtype
) -> None:
    """On hardware bit for bit. The interpreter cuts scales where they are rounded: there the
    integers must be those of the scale."""
    qkv, angles, slots = make_inputs(19, heads, dtype)
    exact, small = (make_storage(heads, it) for it in (name_of(dtype), "int8"))
    for storage in (exact, small):
        rotate_and_store(qkv, angles, heads, None, slots, storage.layers[1])
    layer = exact.layers[1]
    vectors = layer.keys.tokens[slots], layer.values.tokens[slots]
    for (integers, scales), vector in zip(stored(small.layers[1], slots), vectors, strict=True):
        expected, expected_scales = quantize(vector)
        if DEVICE.type == "cpu":
            torch.testing.assert_close(scales, expected_scales, rtol=2.0**-7, atol=0.0)
            expected = (vector.float() / scales[..., None].float()).round().clamp(-127, 127).char()
        else:
            assert torch.equal(scales, expected_scales)
        assert torch.equal(integers, expected)
    assert not small.layers[0].keys.tokens.any()


def test_int8_has_the_definitions_bits_of_extreme_vectors() -> None:
    """Of values whose scales are exact in any rounding: zeros, halves between two integers, the
    smallest float32s, infinities and NaN."""
    heads = HeadShape(1, 1, 16)
    qkv, angles, slots = make_inputs(9, heads, torch.float32)
    value = split_heads(qkv, heads)[2]
    value[0] = 0.0
    value[1, 0] = torch.arange(16) - 8.5
    value[1, 0, 3] = -127.0
    value[2] = value[1] * 2.0**100
    value[3] = value[1] * 2.0**-120
    value[4] = 1e-45
    value[5, 0, 2] = -torch.inf
    value[6, 0, 9] = torch.nan
    value[7, 0, 1], value[7, 0, 12] = torch.nan, torch.inf
    value[8] = -value[1]
    storage = make_storage(heads, "int8")
    rotate_and_store(qkv, angles, heads, None, slots, storage.layers[1])
    integers, scales = stored(storage.layers[1], slots)[1]
    expected, expected_scales = quantize(value)
    assert torch.equal(integers, expected)
    torch.testing.assert_close(scales, expected_scales, rtol=0.0, atol=0.0, equal_nan=True)
    assert integers[1].abs().max() == 127
    assert scales[5].isinf().all()
    assert scales[6:8].isnan().all()


def test_a_cache_may_have_more_elements_than_32_bits_count() -> None:
    """Its last block gets what a small cache's does. (No page of the others is touched.)"""
    heads = HeadShape(1, 8, 128)
    shape = heads.num_kv_heads, heads.dim
    layout = KVLayout.build(64, "int8", ((shape, shape, None),))
    num_blocks = 2**31 // layout.block_bytes + 2
    large, small = (KVStorage(layout, num, device=DEVICE) for num in (num_blocks, 1))
    qkv, angles, _ = make_inputs(3, heads, torch.float32)
    offsets = torch.arange(3, device=DEVICE)
    for storage in (large, small):
        last = torch.full_like(offsets, storage.num_blocks - 1)
        rotate_and_store(qkv, angles, heads, None, (last, offsets), storage.layers[0])
    assert torch.equal(large.bytes[-1], small.bytes[0])
    assert small.bytes.any()


def test_no_tokens_are_no_launch() -> None:
    """Nothing in, nothing out."""
    heads = HeadShape(3, 1, 24)
    qkv, angles, slots = make_inputs(0, heads, torch.float32)
    layer = make_storage(heads, "float32").layers[1]
    assert rotate_and_store(qkv, angles, heads, None, slots, layer).shape == (0, 3, 24)
