"""From the joined product to attention on NVIDIA GPUs: heads' norms, rotation, the cache's store.

A Triton kernel: queries, rotated, into a tensor; keys, rotated, and values straight into the cache,
as they are or in INT8. It computes in float32 and rounds once, to the model's type: nearer to the
exact model than transformers' modules, which round the angles and after each operation. An INT8
cache gets what `layer_cache.quantize` makes of the rounded vector, bit for bit.

    programs:   | queries: rows of ROWS heads, token by token | keys, the same | values, the same |
    a row:      | first half, [BLOCK] | second half, [BLOCK] |    pairs are (first[i], second[i])

A row is computed by itself, whatever the batch and its padding. No launch waits for the device,
and none of the shapes hangs on what is in a tensor: a CUDA graph can hold it. Imported only where
there is a GPU, or Triton's interpreter. Does not know models.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from rillgate_server.worker.layer_cache import Int8Vectors, LayerCache, SlotMapping

_ROUNDS_EVEN = tl.constexpr(12582912.0)
"""1.5 * 2^23: added and taken away it rounds a small float32 half to even."""
_TILE_PAIRS = 1024
"""Pairs that a program rotates, of 128 threads; so a thread loads 16 bytes twice, in bf16."""


@dataclass(frozen=True, slots=True)
class HeadShape:
    """A rank's heads."""

    num_heads: int
    num_kv_heads: int
    dim: int


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Norms of each head's queries and keys."""

    query_weight: Tensor
    """[dim], model dtype."""
    key_weight: Tensor
    """[dim], model dtype."""
    epsilon: float


@triton.jit
def _rows_of(program, num_tokens, HEADS: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the tokens and heads of a program's rows, and whether they are there. [ROWS]."""
    row = program * ROWS + tl.arange(0, ROWS)
    return (row // HEADS).to(tl.int64), row % HEADS, row < num_tokens * HEADS


@triton.jit
def _load_halves(x, at_head, is_row, HALF: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load the halves of vectors that begin `at_head`. Returns [ROWS, BLOCK] twice, float32."""
    at = tl.arange(0, BLOCK)
    is_inside = is_row[:, None] & (at < HALF)[None, :]
    places = x + at_head[:, None] + at[None, :]
    first = tl.load(places, mask=is_inside, other=0.0).to(tl.float32)
    second = tl.load(places + HALF, mask=is_inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_halves(x, at_head, is_row, first, second, HALF: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a launch has no structs
    """Store halves as vectors that begin `at_head`."""
    at = tl.arange(0, BLOCK)
    is_inside = is_row[:, None] & (at < HALF)[None, :]
    places = x + at_head[:, None] + at[None, :]
    tl.store(places, first.to(x.dtype.element_ty), mask=is_inside)
    tl.store(places + HALF, second.to(x.dtype.element_ty), mask=is_inside)


@triton.jit
def _normed(first, second, weight, epsilon, HALF: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Norm each vector."""
    at = tl.arange(0, BLOCK)
    inverse = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / (2 * HALF) + epsilon)
    first_weight = tl.load(weight + at, mask=at < HALF, other=0.0).to(tl.float32)
    second_weight = tl.load(weight + HALF + at, mask=at < HALF, other=0.0).to(tl.float32)
    return (
        first * inverse[:, None] * first_weight[None, :],
        second * inverse[:, None] * second_weight[None, :],
    )


@triton.jit
def _rotated(first, second, cosines, sines, token, is_row, HALF: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a launch has no structs
    """Rotate pairs of first and second half by their token's angles."""
    at = tl.arange(0, BLOCK)
    is_inside = is_row[:, None] & (at < HALF)[None, :]
    # The second half of the angles is the first once more.
    places = token[:, None] * (2 * HALF) + at[None, :]
    cosine = tl.load(cosines + places, mask=is_inside, other=0.0)
    sine = tl.load(sines + places, mask=is_inside, other=0.0)
    return first * cosine - second * sine, second * cosine + first * sine


@triton.jit
def _integers(half, scale):  # type: ignore[no-untyped-def]
    """Return a half in INT8. [ROWS, BLOCK]."""
    quotient = tl.div_rn(half, tl.broadcast_to(scale[:, None], half.shape))
    quotient = tl.where(quotient == quotient, quotient, 0.0)  # 0 / 0, or not finite
    bounded = tl.minimum(tl.maximum(quotient, -127.0), 127.0)
    return ((bounded + _ROUNDS_EVEN) - _ROUNDS_EVEN).to(tl.int8)


@triton.jit
def _store_quantized(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a launch has no structs
    x,
    scales,
    at_head,
    at_scale,
    is_row,
    first,
    second,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store halves in INT8 with their scale, as layer_cache.quantize defines them."""
    most = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1)
    # A NaN may not come through the maximum.
    is_nan = (first != first) | (second != second)
    has_nan = tl.max(is_nan.to(tl.int32), axis=1) > 0
    exact = tl.where(has_nan, float("nan"), tl.div_rn(most, tl.full(most.shape, 127.0, tl.float32)))
    scale = exact.to(tl.bfloat16)
    tl.store(scales + at_scale, scale, mask=is_row)
    scale = scale.to(tl.float32)
    first, second = _integers(first, scale), _integers(second, scale)
    _store_halves(x, at_head, is_row, first, second, HALF, BLOCK)


@triton.jit
def _store_vectors(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a launch has no structs
    x,
    scales,
    slots,
    offsets,
    token,
    head,
    is_row,
    first,
    second,
    block_stride,
    scale_block_stride,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """Store halves in the cache, where their token goes; nowhere if it is padding."""
    block = tl.load(slots + token, mask=is_row, other=-1)
    offset = tl.load(offsets + token, mask=is_row, other=0)
    is_kept = block >= 0
    in_block = offset * KV_HEADS + head
    at_head = block * block_stride + in_block * (2 * HALF)
    if IS_INT8:
        at_scale = block * scale_block_stride + in_block
        _store_quantized(x, scales, at_head, at_scale, is_kept, first, second, HALF, BLOCK)
    else:
        _store_halves(x, at_head, is_kept, first, second, HALF, BLOCK)


@triton.jit(do_not_specialize=["num_tokens"])  # a batch's size may not change what is compiled
def _rotate_and_store(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a launch has no structs # size: the same
    qkv,
    cosines,
    sines,
    query_weight,
    key_weight,
    query,
    keys,
    values,
    key_scales,
    value_scales,
    slots,
    offsets,
    num_tokens,
    block_stride,
    scale_block_stride,
    epsilon,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    IS_INT8: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute ROWS heads: of queries, then, in programs of their own, of keys and of values."""
    model_type = qkv.dtype.element_ty
    dim: tl.constexpr = 2 * HALF
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * dim
    program = tl.program_id(0)
    num_query_programs = tl.cdiv(num_tokens * HEADS, ROWS)
    num_key_programs = tl.cdiv(num_tokens * KV_HEADS, ROWS)
    if program < num_query_programs:
        token, head, is_row = _rows_of(program, num_tokens, HEADS, ROWS)
        first, second = _load_halves(qkv, token * width + head * dim, is_row, HALF, BLOCK)
        if HAS_NORMS:
            first, second = _normed(first, second, query_weight, epsilon, HALF, BLOCK)
        first, second = _rotated(first, second, cosines, sines, token, is_row, HALF, BLOCK)
        _store_halves(query, (token * HEADS + head) * dim, is_row, first, second, HALF, BLOCK)
    elif program < num_query_programs + num_key_programs:
        token, head, is_row = _rows_of(program - num_query_programs, num_tokens, KV_HEADS, ROWS)
        at_head = token * width + (HEADS + head) * dim
        first, second = _load_halves(qkv, at_head, is_row, HALF, BLOCK)
        if HAS_NORMS:
            first, second = _normed(first, second, key_weight, epsilon, HALF, BLOCK)
        first, second = _rotated(first, second, cosines, sines, token, is_row, HALF, BLOCK)
        first, second = first.to(model_type).to(tl.float32), second.to(model_type).to(tl.float32)
        _store_vectors(
            keys,
            key_scales,
            slots,
            offsets,
            token,
            head,
            is_row,
            first,
            second,
            block_stride,
            scale_block_stride,
            KV_HEADS,
            HALF,
            BLOCK,
            IS_INT8,
        )
    else:
        program -= num_query_programs + num_key_programs
        token, head, is_row = _rows_of(program, num_tokens, KV_HEADS, ROWS)
        at_head = token * width + (HEADS + KV_HEADS + head) * dim
        first, second = _load_halves(qkv, at_head, is_row, HALF, BLOCK)
        _store_vectors(
            values,
            value_scales,
            slots,
            offsets,
            token,
            head,
            is_row,
            first,
            second,
            block_stride,
            scale_block_stride,
            KV_HEADS,
            HALF,
            BLOCK,
            IS_INT8,
        )


def rotate_and_store(
    qkv: Tensor,
    angles: tuple[Tensor, Tensor],
    heads: HeadShape,
    norms: HeadNorms | None,
    slot_mapping: SlotMapping,
    cache: LayerCache,
) -> Tensor:
    """Norm and rotate queries and keys; store keys and values; return the queries.

    qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * dim], contiguous, model dtype; angles:
    cosines and sines, [num_tokens, dim], contiguous, float32, both halves alike. A token whose
    block is -1 is padding and stored nowhere. Returns [num_tokens, num_heads, dim].
    """
    num_tokens = len(qkv)
    query = qkv.new_empty(num_tokens, heads.num_heads, heads.dim)
    if not num_tokens:
        return query
    keys, values = cache.keys, cache.values
    is_int8 = isinstance(keys, Int8Vectors)
    key_scales = keys.scales if isinstance(keys, Int8Vectors) else keys.tokens
    value_scales = values.scales if isinstance(values, Int8Vectors) else values.tokens
    block = triton.next_power_of_2(heads.dim // 2)
    rows = max(1, _TILE_PAIRS // block)
    num_kv_programs = triton.cdiv(num_tokens * heads.num_kv_heads, rows)
    grid = (triton.cdiv(num_tokens * heads.num_heads, rows) + 2 * num_kv_programs,)
    _rotate_and_store[grid](
        qkv,
        *angles,
        qkv if norms is None else norms.query_weight,
        qkv if norms is None else norms.key_weight,
        query,
        keys.tokens,
        values.tokens,
        key_scales,
        value_scales,
        *slot_mapping,
        num_tokens,
        keys.tokens.stride(0),
        key_scales.stride(0),
        0.0 if norms is None else norms.epsilon,
        HEADS=heads.num_heads,
        KV_HEADS=heads.num_kv_heads,
        HALF=heads.dim // 2,
        HAS_NORMS=norms is not None,
        IS_INT8=is_int8,
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
        # Unfused: a product and what it is added to are two roundings, whatever the compiler.
        enable_fp_fusion=False,
    )
    return query
