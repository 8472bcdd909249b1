"""The least weight that top_k, top_p and min_p keep, found on a GPU without sorting, in Triton.

Positive float64 are in the order of their bits, so that a search narrows an interval of bits by a
few pivots in each pass over the weights. Weights are exponentials: equal steps of their bits are
about equal steps of the logits, and a handful of passes tell any two apart.

Does not know logits or what follows from the threshold (gpu.sampling_kernels, which also says
where this may be imported).
"""

import triton
import triton.language as tl

from rillgate_server.worker.gpu.sampling_tables import FRACTIONS, WHOLES

_NUM_FRACTIONS = tl.constexpr(len(FRACTIONS))
_TEMPERATURE = tl.constexpr(FRACTIONS.index("temperature"))
_TOP_P = tl.constexpr(FRACTIONS.index("top_p"))
_MIN_P = tl.constexpr(FRACTIONS.index("min_p"))
_NUM_WHOLES = tl.constexpr(len(WHOLES))
_TOP_K = tl.constexpr(WHOLES.index("top_k"))
_BITS_ABOVE_ONE = tl.constexpr(0x3FF0000000000001)
"""Of the least float64 above 1, the largest weight."""
_NUM_COMPARED = tl.constexpr(16)
"""Parts that all parts are compared with at once; more would take registers."""
_NUM_PIVOTS = tl.constexpr(8)
"""A pass narrows the interval nine times. With more, comparing would take longer than reading."""


@triton.jit
def least_kept(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a launch has no structs
    fractions,
    wholes,
    slot,
    bests,
    best,
    VOCAB_SIZE: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Return whether a slot has a filter, whether it needs the sum of all weights of the row, and
    a weight that its threshold does not lie below. bests: the largest logits of the row's parts.

    The k largest of those are k tokens. Weights below (1 - top_p) / vocab_size are less than
    1 - top_p in all, and the total is at least the largest weight, 1.
    """
    top_k = tl.load(wholes + slot * _NUM_WHOLES + _TOP_K)
    top_p = tl.load(fractions + slot * _NUM_FRACTIONS + _TOP_P)
    cut = tl.load(fractions + slot * _NUM_FRACTIONS + _MIN_P)
    is_filtered = (top_k > 0) | (top_p < 1.0) | (cut > 0.0)
    needs_all = (top_k == 0) & (top_p < 1.0)
    if needs_all:
        cut = (1.0 - top_p) / VOCAB_SIZE
    if top_k > 0:
        part = tl.arange(0, PARTS)
        values = tl.load(bests + part, mask=part < NUM_PARTS, other=float("-inf"))
        num_as_large = tl.zeros((PARTS,), tl.int32)
        for first in range(0, PARTS, _NUM_COMPARED):
            other = first + tl.arange(0, _NUM_COMPARED)
            others = tl.load(bests + other, mask=other < NUM_PARTS, other=float("-inf"))
            num_as_large += tl.sum((others[None, :] >= values[:, None]).to(tl.int32), axis=1)
        least = tl.max(tl.where(num_as_large >= top_k, values, float("-inf")), axis=0)
        temperature = tl.load(fractions + slot * _NUM_FRACTIONS + _TEMPERATURE)
        cut = tl.exp(tl.minimum(least / temperature - best / temperature, 0.0))
    return is_filtered, needs_all, cut * 0.999  # less by what may be rounded


@triton.jit
def _largest_that_reaches(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a launch has no structs
    candidates,
    num_candidates,
    column,
    longest,
    lowest,
    goal,
    IS_WEIGHED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return the largest weight that, with all above it, reaches `goal` in number or in sum.

    Not below `lowest`; the least of all where none reaches. low reaches, high does not, and the
    answer lies in between:

        lowest ... low ... smallest ... answer ... largest | high ... 1
    """
    low = tl.maximum(lowest.to(tl.int64, bitcast=True), 1)
    high = tl.full((), _BITS_ABOVE_ONE, tl.int64)
    step_no = 1 + tl.arange(0, _NUM_PIVOTS)
    is_open = longest > 0
    while is_open:
        pivots = tl.minimum(low + tl.maximum((high - low) // (_NUM_PIVOTS + 1), 1) * step_no, high)
        pivot_weights = pivots.to(tl.float64, bitcast=True)
        low_weight = low.to(tl.float64, bitcast=True)
        high_weight = high.to(tl.float64, bitcast=True)
        reached = tl.zeros((_NUM_PIVOTS,), tl.float64)
        smallest = tl.full((), float("inf"), tl.float64)
        largest = tl.full((), 0.0, tl.float64)
        first = 0
        while first < longest:
            weights = tl.load(candidates + first, mask=first + column < num_candidates, other=0.0)
            gains = weights if IS_WEIGHED else tl.full(weights.shape, 1.0, tl.float64)
            is_above = weights[None, :] >= pivot_weights[:, None]
            reached += tl.sum(tl.where(is_above, gains[None, :], 0.0), axis=1)
            is_between = (weights >= low_weight) & (weights < high_weight)
            smallest = tl.minimum(
                smallest, tl.min(tl.where(is_between, weights, float("inf")), axis=0)
            )
            largest = tl.maximum(largest, tl.max(tl.where(is_between, weights, 0.0), axis=0))
            first += COLUMNS
        has_reached = reached >= goal
        high = tl.minimum(high, tl.min(tl.where(has_reached, high, pivots), axis=0))
        low = tl.maximum(low, tl.max(tl.where(has_reached, pivots, low), axis=0))
        if smallest <= largest:
            low = tl.maximum(low, smallest.to(tl.int64, bitcast=True))
            high = tl.minimum(high, largest.to(tl.int64, bitcast=True) + 1)
        is_open = (high - low > 1) & (smallest < largest)
    return low.to(tl.float64, bitcast=True)


@triton.jit
def _sums_from(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a launch has no structs
    threshold,
    candidates,
    counts,
    longest,
    NUM_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    PART_LEN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum each part's weights that are not below the threshold."""
    part = tl.arange(0, PARTS)
    column = tl.arange(0, COLUMNS)
    count = tl.load(counts + part, mask=part < NUM_PARTS, other=0)
    table = candidates + part[:, None] * PART_LEN + column[None, :]
    sums = tl.zeros((PARTS,), tl.float64)
    first = 0
    while first < longest:
        is_one = first + column[None, :] < count[:, None]
        weights = tl.load(table + first, mask=is_one, other=0.0)
        sums += tl.sum(tl.where(weights >= threshold, weights, 0.0), axis=1)
        first += COLUMNS
    return sums


@triton.jit(do_not_specialize=["num_rows", "first"])
def choose_filter(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a launch has no structs
    rows,
    num_rows,
    first,
    fractions,
    wholes,
    sums,
    thresholds,
    candidates,
    counts,
    NUM_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
    PART_LEN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Find the least weight that one row's filters keep, and sum each part's kept weights anew."""
    drawn = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + 2 * num_rows + first + drawn).to(tl.int64)
    slot = tl.load(rows + row).to(tl.int64)
    counts += drawn * NUM_PARTS
    candidates += drawn * NUM_PARTS * PART_LEN
    # A pass takes COLUMNS candidates of each part; the searches see them in one line.
    line = tl.arange(0, PARTS * COLUMNS)
    line_part, column = line // COLUMNS, line % COLUMNS
    count = tl.load(counts + line_part, mask=line_part < NUM_PARTS, other=0)
    line_at = candidates + line_part * PART_LEN + column
    longest = tl.max(count, axis=0)
    part = tl.arange(0, PARTS)
    own_sums = sums + row * NUM_PARTS + part
    threshold = tl.full((), 0.0, tl.float64)
    kept = tl.load(own_sums, mask=part < NUM_PARTS, other=0.0)
    top_k = tl.load(wholes + slot * _NUM_WHOLES + _TOP_K)
    if top_k > 0:
        threshold = _largest_that_reaches(
            line_at, count, column, longest, threshold, top_k.to(tl.float64), False, COLUMNS
        )
        kept = _sums_from(
            threshold, candidates, counts, longest, NUM_PARTS, PARTS, PART_LEN, COLUMNS
        )
    top_p = tl.load(fractions + slot * _NUM_FRACTIONS + _TOP_P)
    if top_p < 1.0:
        goal = top_p * tl.sum(kept, axis=0)
        threshold = _largest_that_reaches(
            line_at, count, column, longest, threshold, goal, True, COLUMNS
        )
    min_p = tl.load(fractions + slot * _NUM_FRACTIONS + _MIN_P)
    threshold = tl.maximum(threshold, min_p)  # the largest weight is 1
    kept = _sums_from(threshold, candidates, counts, longest, NUM_PARTS, PARTS, PART_LEN, COLUMNS)
    tl.store(own_sums, kept, mask=part < NUM_PARTS)
    tl.store(thresholds + row, threshold)
