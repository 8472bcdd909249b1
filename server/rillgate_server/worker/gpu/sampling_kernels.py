"""worker.sampler's draw on a GPU, in Triton: what runs there.

A row of logits is cut into parts of PART_LEN tokens, the same for any batch, so that a row's sums
have the same bits whatever rows lie beside it:

    find_best   [rows, parts]   largest logit of each part, raw and after ban, bias and penalties
    weigh       [rows, parts]   sum of exp((logit - best) / temperature) of each part; where a
                                filter is to come, those weights that it may keep, close together
    choose_filter [rows]        the least weight that top_k, top_p and min_p keep, and new sums
                                (gpu.sampling_filter)
    pick        [rows]          the part in which the cumulative sum exceeds u * total, in it the
                                token; notes the token in the slot's tables

No program reads what another of the same launch writes. `rows`, [4, num_rows] int32, says of each
row its slot and the tokens generated before, then which rows are drawn. Kernels are launched
without fused products: each rounding is one of the definition's.

Imported only where there is a GPU, or Triton's interpreter (TRITON_INTERPRET=1, in tests): builds
of torch for CPUs come without Triton. Launches are gpu.sampling_launches'.
"""

import triton
import triton.language as tl

from rillgate_server.core.random_draw import PURPOSE_SAMPLE
from rillgate_server.worker.gpu import sampling_tables as layout
from rillgate_server.worker.gpu.sampling_filter import least_kept
from rillgate_server.worker.gpu.sampling_tables import FRACTIONS, WHOLES

_NUM_FRACTIONS = tl.constexpr(len(FRACTIONS))
_TEMPERATURE = tl.constexpr(FRACTIONS.index("temperature"))
_REPETITION = tl.constexpr(FRACTIONS.index("repetition_penalty"))
_PRESENCE = tl.constexpr(FRACTIONS.index("presence_penalty"))
_FREQUENCY = tl.constexpr(FRACTIONS.index("frequency_penalty"))
_NUM_WHOLES = tl.constexpr(len(WHOLES))
_SEED = tl.constexpr(WHOLES.index("seed"))
_CHOICE = tl.constexpr(WHOLES.index("choice_index"))
_MIN_TOKENS = tl.constexpr(WHOLES.index("min_tokens"))
_ENTRY_ROW = tl.constexpr(WHOLES.index("entry_row"))
_IS_IN_PROMPT = tl.constexpr(layout.IS_IN_PROMPT)
_IS_BANNED = tl.constexpr(layout.IS_BANNED)
_BIAS_SHIFT = tl.constexpr(layout.BIAS_SHIFT)
_BIAS_MASK = tl.constexpr(layout.BIAS_MASK)
_BIAS_COLUMNS = tl.constexpr(layout.BIAS_COLUMNS)
_COUNT_SHIFT = tl.constexpr(layout.COUNT_SHIFT)
_MAX_COUNT = tl.constexpr(layout.MAX_COUNT)
_ONE_MORE = tl.constexpr(1 << layout.COUNT_SHIFT)
_PURPOSE_SAMPLE = tl.constexpr(PURPOSE_SAMPLE)
_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _adjust(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a launch has no structs
    x, ids, is_id, slot, num_generated, slot_tables, VOCAB_SIZE: tl.constexpr
):
    """Return the logits x of `ids` after ban, bias and penalties, in float64."""
    fractions, wholes, entries, biases = slot_tables
    entry_row = tl.load(wholes + slot * _NUM_WHOLES + _ENTRY_ROW)
    if entry_row >= 0:
        entry = tl.load(entries + entry_row * VOCAB_SIZE + ids, mask=is_id, other=0)
        is_banning = num_generated < tl.load(wholes + slot * _NUM_WHOLES + _MIN_TOKENS)
        x = tl.where(((entry & _IS_BANNED) != 0) & is_banning, float("-inf"), x)
        place = (entry >> _BIAS_SHIFT) & _BIAS_MASK
        x += tl.load(biases + entry_row * _BIAS_COLUMNS + place, mask=place > 0, other=0.0)
        count = (entry >> _COUNT_SHIFT).to(tl.float64)
        is_said = ((entry & _IS_IN_PROMPT) != 0) | (count > 0.0)
        repetition = tl.load(fractions + slot * _NUM_FRACTIONS + _REPETITION)
        x = tl.where(is_said, tl.where(x > 0.0, x / repetition, x * repetition), x)
        presence = tl.load(fractions + slot * _NUM_FRACTIONS + _PRESENCE)
        x -= tl.where(count > 0.0, presence, 0.0)
        x -= tl.load(fractions + slot * _NUM_FRACTIONS + _FREQUENCY) * count
    return x


@triton.jit
def _best_of_row(raw_bests, bests, best_ids, row, NUM_PARTS: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a row's largest logit, its lowest id, and whether a token can be drawn at all."""
    part = tl.arange(0, PARTS)
    at = row * NUM_PARTS + part
    is_part = part < NUM_PARTS
    raw = tl.max(tl.load(raw_bests + at, mask=is_part, other=float("-inf")), axis=0)
    values = tl.load(bests + at, mask=is_part, other=float("-inf"))
    best = tl.max(values, axis=0)
    ids = tl.load(best_ids + at, mask=is_part, other=_NO_ID)
    best_id = tl.min(tl.where(values == best, ids, _NO_ID), axis=0)
    is_sound = (tl.abs(raw) < float("inf")) & (tl.abs(best) < float("inf"))
    return best, best_id, is_sound


@triton.jit(do_not_specialize=["num_rows"])
def find_best(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a launch has no structs
    logits,
    row_stride,
    rows,
    num_rows,
    fractions,
    wholes,
    entries,
    biases,
    raw_bests,
    bests,
    best_ids,
    VOCAB_SIZE: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PART_LEN: tl.constexpr,
    ANY_ENTRIES: tl.constexpr,
):
    """Find the largest logit of one part of one row."""
    slot_tables = fractions, wholes, entries, biases
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    ids = part * PART_LEN + tl.arange(0, PART_LEN)
    is_id = ids < VOCAB_SIZE
    raw = tl.load(logits + row * row_stride + ids, mask=is_id, other=float("-inf")).to(tl.float32)
    raw = tl.where(raw == raw, raw, float("inf"))  # a maximum may lose a NaN
    slot = tl.load(rows + row).to(tl.int64)
    num_generated = tl.load(rows + num_rows + row)
    x = raw
    if ANY_ENTRIES:
        x = _adjust(x.to(tl.float64), ids, is_id, slot, num_generated, slot_tables, VOCAB_SIZE)
    best = tl.max(x, axis=0)
    tl.store(raw_bests + row * NUM_PARTS + part, tl.max(raw, axis=0))
    tl.store(bests + row * NUM_PARTS + part, best.to(tl.float64))
    tl.store(best_ids + row * NUM_PARTS + part, tl.min(tl.where(x == best, ids, _NO_ID), axis=0))


@triton.jit
def _weights(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a launch has no structs
    row_logits,
    ids,
    slot,
    num_generated,
    slot_tables,
    best,
    VOCAB_SIZE: tl.constexpr,
    ANY_ENTRIES: tl.constexpr,
):
    """Return exp((x - best) / temperature) of a row's `ids`, the same bits in each kernel."""
    is_id = ids < VOCAB_SIZE
    x = tl.load(row_logits + ids, mask=is_id, other=float("-inf")).to(tl.float64)
    if ANY_ENTRIES:
        x = _adjust(x, ids, is_id, slot, num_generated, slot_tables, VOCAB_SIZE)
    temperature = tl.load(slot_tables[0] + slot * _NUM_FRACTIONS + _TEMPERATURE)
    if temperature != 1.0:  # divisions take about as long as exponentials
        x = x / temperature
    return tl.exp(x - best / temperature)


@triton.jit(do_not_specialize=["num_rows", "first"])
def weigh(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a launch has no structs
    logits,
    row_stride,
    rows,
    num_rows,
    first,
    fractions,
    wholes,
    entries,
    biases,
    raw_bests,
    bests,
    best_ids,
    sums,
    thresholds,
    candidates,
    counts,
    VOCAB_SIZE: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    PART_LEN: tl.constexpr,
    ANY_ENTRIES: tl.constexpr,
):
    """Sum the weights of one part of one drawn row, and collect what filters may keep of them."""
    slot_tables = fractions, wholes, entries, biases
    drawn = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = tl.load(rows + 2 * num_rows + first + drawn).to(tl.int64)
    slot = tl.load(rows + row).to(tl.int64)
    num_generated = tl.load(rows + num_rows + row)
    best, _, is_needed = _best_of_row(raw_bests, bests, best_ids, row, NUM_PARTS, PARTS)
    best = tl.where(is_needed, best, 0.0)  # of a broken row nothing is weighed
    is_filtered, needs_all, cut = least_kept(
        fractions, wholes, slot, bests + row * NUM_PARTS, best, VOCAB_SIZE, NUM_PARTS, PARTS
    )
    if is_filtered & (needs_all == 0):
        temperature = tl.load(fractions + slot * _NUM_FRACTIONS + _TEMPERATURE)
        own_best = tl.load(bests + row * NUM_PARTS + part)
        largest = tl.exp(tl.minimum(own_best / temperature - best / temperature, 0.0))
        is_needed = is_needed & (largest >= cut)
    total = tl.full((), 0.0, tl.float64)
    count = 0
    if is_needed:
        row_logits = logits + row * row_stride
        ids = part * PART_LEN + tl.arange(0, PART_LEN)
        weights = _weights(
            row_logits, ids, slot, num_generated, slot_tables, best, VOCAB_SIZE, ANY_ENTRIES
        )
        total = tl.sum(weights, axis=0)
        if is_filtered:
            is_candidate = (weights > 0.0) & (weights >= cut)
            place = tl.cumsum(is_candidate.to(tl.int32), axis=0) - 1
            target = candidates + (drawn * NUM_PARTS + part) * PART_LEN
            tl.store(target + place, weights, mask=is_candidate)
            count = tl.sum(is_candidate.to(tl.int32), axis=0)
    tl.store(sums + row * NUM_PARTS + part, total)
    if part == 0:
        tl.store(thresholds + row, 0.0)
    if is_filtered:
        tl.store(counts + drawn * NUM_PARTS + part, count)


@triton.jit
def uniform(seed, choice, position):  # type: ignore[no-untyped-def]
    """Return core.random_draw.uniform's number, bit for bit."""
    w0, w1, _, _ = tl.philox(seed, position, choice, _PURPOSE_SAMPLE, 0)
    high = (w0 >> 6).to(tl.float64)
    low = (w1 >> 6).to(tl.float64)
    return (high * 67108864.0 + low + 0.5) * 2.220446049250313e-16  # 2^26, 2^-52: all exact


@triton.jit
def _first_above(values, reach, target, index):  # type: ignore[no-untyped-def]
    """Return the first index with a value whose `reach` exceeds target, or the last with a value.

    A scan's sums may differ in their last bits between equal prefixes, so that an index without a
    value might seem to exceed first.
    """
    has_value = values > 0.0
    chosen = tl.min(tl.where(has_value & (reach > target), index, _NO_ID), axis=0)
    last = tl.max(tl.where(has_value, index, 0), axis=0)
    return tl.minimum(chosen, last)


@triton.jit(do_not_specialize=["num_rows"])
def pick(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a launch has no structs
    logits,
    row_stride,
    rows,
    num_rows,
    fractions,
    wholes,
    entries,
    biases,
    last_tokens,
    raw_bests,
    bests,
    best_ids,
    sums,
    thresholds,
    token_ids,
    VOCAB_SIZE: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    PART_LEN: tl.constexpr,
    ANY_ENTRIES: tl.constexpr,
    ANY_DRAWN: tl.constexpr,
):
    """Choose one row's token and note it in its slot."""
    slot_tables = fractions, wholes, entries, biases
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(rows + row).to(tl.int64)
    num_generated = tl.load(rows + num_rows + row)
    best, token, is_sound = _best_of_row(raw_bests, bests, best_ids, row, NUM_PARTS, PARTS)
    if ANY_DRAWN:
        is_drawn = tl.load(fractions + slot * _NUM_FRACTIONS + _TEMPERATURE) > 0.0
        if is_drawn & is_sound:
            part = tl.arange(0, PARTS)
            own = tl.load(sums + row * NUM_PARTS + part, mask=part < NUM_PARTS, other=0.0)
            seed = tl.load(wholes + slot * _NUM_WHOLES + _SEED)
            choice = tl.load(wholes + slot * _NUM_WHOLES + _CHOICE).to(tl.int32)
            target = uniform(seed, choice, num_generated) * tl.sum(own, axis=0)
            chosen = _first_above(own, tl.cumsum(own, axis=0), target, part)
            before = tl.sum(tl.where(part < chosen, own, 0.0), axis=0)
            row_logits = logits + row * row_stride
            ids = chosen * PART_LEN + tl.arange(0, PART_LEN)
            weights = _weights(
                row_logits, ids, slot, num_generated, slot_tables, best, VOCAB_SIZE, ANY_ENTRIES
            )
            weights = tl.where(weights >= tl.load(thresholds + row), weights, 0.0)
            token = _first_above(weights, before + tl.cumsum(weights, axis=0), target, ids)
    tl.store(token_ids + row, tl.where(is_sound, token, -1).to(tl.int64))
    tl.store(last_tokens + slot, tl.where(is_sound, token, -1).to(tl.int64))
    entry_row = tl.load(wholes + slot * _NUM_WHOLES + _ENTRY_ROW)
    if (entry_row >= 0) & is_sound:
        entry_at = entries + entry_row * VOCAB_SIZE + token
        entry = tl.load(entry_at)
        if (entry >> _COUNT_SHIFT) < _MAX_COUNT:
            tl.store(entry_at, entry + _ONE_MORE)
