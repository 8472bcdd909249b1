"""The Triton kernels of attention over block tables (attention.triton_paged calls them).

Softmax runs online in float32 (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867). Lines of
a tile are its queries times the query heads that share a head of keys. Nothing is read that was not
written: what lies behind a context's end may be anything, NaN included.

Imported only where there is a GPU, or Triton's interpreter (tests).
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def store_vectors(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a launch has no structs
    vectors,
    cache,
    scales,
    blocks,
    offsets,
    head_stride,
    token_stride,
    block_stride,
    scale_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """Store one new token's vector of one head; nothing where its block is -1 (padding)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block = tl.load(blocks + token)
    if block < 0:
        return
    offset = tl.load(offsets + token)
    at = tl.arange(0, PADDED)
    is_own = at < DIM
    vector = tl.load(
        vectors + head * head_stride + token * token_stride + at, mask=is_own, other=0.0
    )
    place = cache + block * block_stride + (offset * HEADS + head) * DIM + at
    if IS_INT8:
        whole, scale = quantize_vector(vector, PADDED)
        tl.store(place, whole, mask=is_own)
        tl.store(scales + block * scale_stride + offset * HEADS + head + tl.arange(0, 1), scale)
    else:
        tl.store(place, vector, mask=is_own)


@triton.jit
def quantize_vector(vector, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a vector as int8 and its bfloat16 scale [1], as layer_cache.quantize defines it."""
    exact = vector.to(tl.float32)
    size = tl.abs(exact)
    # A NaN may not come through the maximum.
    is_broken = tl.sum((size < float("inf")).to(tl.int32), axis=0, keep_dims=True) < PADDED
    largest = tl.max(tl.where(size < float("inf"), size, 0.0), axis=0, keep_dims=True)
    scale = tl.where(is_broken, float("nan"), tl.div_rn(largest, 127.0)).to(tl.bfloat16)
    whole = tl.div_rn(exact, scale.to(tl.float32))
    whole = tl.where(whole == whole, whole, 0.0)  # zeros by zero, or by a scale that is NaN
    whole = tl.minimum(tl.maximum(whole, -127.0), 127.0)
    whole = (whole + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds half to even
    return whole.to(tl.int8), scale


# Compiled once for each type and shape of heads: what differs from step to step is not looked at.
@triton.jit(
    do_not_specialize=["window", "items_stride"],
    do_not_specialize_on_alignment=["tables", "items", "count"],
)
def attend(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0915  # size: a third is arguments
    query,
    keys,
    key_scales,
    values,
    value_scales,
    tables,
    items,
    count,
    output,
    parts,
    sums,
    scaling,
    window,
    items_stride,
    query_token_stride,
    query_head_stride,
    key_stride,
    key_scale_stride,
    value_stride,
    value_scale_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_LINES: tl.constexpr,
    QUERIES: tl.constexpr,
    PART_LINES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """Attend for items and one head of keys.

    items: see tiles.Cut; count: how many there are. A program takes one item after another, so that
    a captured launch, which must have room for the most items, has no more programs than pay.
    output: [tokens, HEADS * GROUP, VALUE_DIM]. parts: [parts, HEADS, PART_LINES, VALUE_DIM] and
    sums: [parts, HEADS, PART_LINES], float32: the logarithm, base 2, of the sum of exponentials.
    """
    head = tl.program_id(1)
    for item in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        token = tl.load(items + item).to(tl.int64)
        num_tokens = tl.load(items + items_stride + item)
        start = tl.load(items + 2 * items_stride + item)
        table = tables + tl.load(items + 3 * items_stride + item)
        first = tl.load(items + 4 * items_stride + item)
        end = tl.load(items + 5 * items_stride + item)
        part = tl.load(items + 6 * items_stride + item).to(tl.int64)

        line = tl.arange(0, QUERIES * GROUP_LINES)
        own, of_group = line // GROUP_LINES, line % GROUP_LINES
        is_line = (own < num_tokens) & (of_group < GROUP)
        query_head = head * GROUP + of_group
        position = start + own
        key_at, value_at = tl.arange(0, KEY_PADDED), tl.arange(0, VALUE_PADDED)
        own_token = token + own
        q = tl.load(
            query
            + query_head[:, None] * query_head_stride
            + own_token[:, None] * query_token_stride
            + key_at[None, :],
            mask=is_line[:, None] & (key_at < KEY_DIM)[None, :],
            other=0.0,
        )
        most = tl.full((QUERIES * GROUP_LINES,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((QUERIES * GROUP_LINES,), dtype=tl.float32)
        found = tl.zeros((QUERIES * GROUP_LINES, VALUE_PADDED), dtype=tl.float32)
        for at in range(first, end, KEYS):
            seen = at + tl.arange(0, KEYS)
            is_seen = seen < end
            block = tl.load(table + seen // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
            in_block = (seen % BLOCK_SIZE) * HEADS + head
            k = tl.load(
                keys + (block * key_stride + in_block * KEY_DIM)[None, :] + key_at[:, None],
                mask=is_seen[None, :] & (key_at < KEY_DIM)[:, None],
                other=0,
            )
            v = tl.load(
                values + (block * value_stride + in_block * VALUE_DIM)[:, None] + value_at[None, :],
                mask=is_seen[:, None] & (value_at < VALUE_DIM)[None, :],
                other=0,
            )
            score = tl.dot(q, k.to(q.dtype), input_precision="tf32x3")
            if IS_INT8:  # integers are exact in the model's type; their scales go onto the products
                scale = tl.load(
                    key_scales + block * key_scale_stride + in_block, mask=is_seen, other=0.0
                )
                score = score * scale.to(tl.float32)[None, :]
            score = score * (scaling * _LOG2_E)
            is_in = is_seen[None, :] & (seen[None, :] <= position[:, None])
            if window > 0:
                is_in = is_in & (seen[None, :] > position[:, None] - window)
            score = tl.where(is_in, score, float("-inf"))
            new_most = tl.maximum(most, tl.max(score, axis=1))
            # A line that has seen nothing yet keeps zeros: -inf less -inf would be a NaN.
            base = tl.where(new_most == float("-inf"), 0.0, new_most)
            weight = tl.exp2(score - base[:, None])
            shrink = tl.exp2(most - base)
            total = total * shrink + tl.sum(weight, axis=1)
            if IS_INT8:
                scale = tl.load(
                    value_scales + block * value_scale_stride + in_block, mask=is_seen, other=0.0
                )
                weight = tl.where(is_in, weight * scale.to(tl.float32)[None, :], 0.0)
            found = found * shrink[:, None]
            found += tl.dot(weight.to(q.dtype), v.to(q.dtype), input_precision="tf32x3")
            most = new_most
        found = found / tl.where(total == 0.0, 1.0, total)[:, None]
        is_out = is_line[:, None] & (value_at < VALUE_DIM)[None, :]
        if part < 0:
            place = (own_token * (HEADS * GROUP) + query_head)[:, None] * VALUE_DIM
            tl.store(
                output + place + value_at[None, :], found.to(output.dtype.element_ty), mask=is_out
            )
        else:
            left = (part * HEADS + head) * PART_LINES + own * GROUP + of_group
            tl.store(parts + left[:, None] * VALUE_DIM + value_at[None, :], found, mask=is_out)
            tl.store(sums + left, most + tl.log2(total), mask=is_line)


@triton.jit(do_not_specialize=["joins_stride"], do_not_specialize_on_alignment=["joins", "count"])
def join(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    parts,
    sums,
    joins,
    count,
    output,
    joins_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_LINES: tl.constexpr,
    QUERIES: tl.constexpr,
    PART_LINES: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Join the parts of one tile and one head of keys, in order. joins: see tiles.Cut."""
    tile, head = tl.program_id(0), tl.program_id(1)
    if tile >= tl.load(count):
        return
    token = tl.load(joins + tile).to(tl.int64)
    num_tokens = tl.load(joins + joins_stride + tile)
    first = tl.load(joins + 2 * joins_stride + tile).to(tl.int64)
    num_parts = tl.load(joins + 3 * joins_stride + tile)
    line = tl.arange(0, QUERIES * GROUP_LINES)
    own, of_group = line // GROUP_LINES, line % GROUP_LINES
    is_line = (own < num_tokens) & (of_group < GROUP)
    at = tl.arange(0, PADDED)
    is_in = is_line[:, None] & (at < DIM)[None, :]
    most = tl.full((QUERIES * GROUP_LINES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES * GROUP_LINES,), dtype=tl.float32)
    joined = tl.zeros((QUERIES * GROUP_LINES, PADDED), dtype=tl.float32)
    for nth in range(0, num_parts):
        left = ((first + nth) * HEADS + head) * PART_LINES + own * GROUP + of_group
        part_sum = tl.load(sums + left, mask=is_line, other=float("-inf"))
        part = tl.load(parts + left[:, None] * DIM + at[None, :], mask=is_in, other=0.0)
        new_most = tl.maximum(most, part_sum)
        base = tl.where(new_most == float("-inf"), 0.0, new_most)
        shrink, weight = tl.exp2(most - base), tl.exp2(part_sum - base)
        total = total * shrink + weight
        joined = joined * shrink[:, None] + part * weight[:, None]
        most = new_most
    joined = joined / tl.where(total == 0.0, 1.0, total)[:, None]
    place = ((token + own) * (HEADS * GROUP) + head * GROUP + of_group)[:, None] * DIM
    tl.store(output + place + at[None, :], joined.to(output.dtype.element_ty), mask=is_in)
