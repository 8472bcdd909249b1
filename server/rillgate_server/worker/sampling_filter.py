"""The least weight that top_k, top_p and min_p keep, found on a GPU without sorting, in Triton.

Positive float64 are in the order of their bits, so that a search narrows an interval of bits by a
few pivots in each pass over the weights. Weights are exponentials: equal steps of their bits are
about equal steps of the logits, and a handful of passes tell any two apart.

Does not know logits or what follows from the threshold (worker.sampling_kernels, which also says
where this may be imported).
"""

import triton
import triton.language as tl

from rillgate_server.worker.sampling_tables import FRACTIONS, WHOLES

_NUM_FRACTIONS = tl.constexpr(len(FRACTIONS))
_TOP_P = tl.constexpr(FRACTIONS.index("top_p"))
_MIN_P = tl.constexpr(FRACTIONS.index("min_p"))
_NUM_WHOLES = tl.constexpr(len(WHOLES))
_TOP_K = tl.constexpr(WHOLES.index("top_k"))
_BITS_ABOVE_ONE = tl.constexpr(0x3FF0000000000001)
"""Of the least float64 above 1, the largest weight."""
_NUM_PIVOTS = tl.constexpr(8)
"""A pass narrows the interval nine times. With more, comparing would take longer than reading."""


@triton.jit
def least_kept(top_k, top_p, min_p, bests, temperature, VOCAB_SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a weight that the row's threshold does not lie below. bests: of its parts.

    The k largest of the parts' largest logits are k tokens. Below (1 - top_p) / vocab_size lies
    less than 1 - top_p in all, and the total is at least the largest weight, 1.
    """
    cut = min_p
    if (top_k > 0) | (top_p < 1.0):
        cut = (1.0 - top_p) / VOCAB_SIZE
        if top_k > 0:
            as_large = tl.sum((bests[None, :] >= bests[:, None]).to(tl.int32), axis=1)
            least = tl.max(tl.where(as_large >= top_k, bests, float("-inf")), axis=0)
            cut = tl.exp(least / temperature - tl.max(bests, axis=0) / temperature)
    return cut * 0.999  # roundings


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
    # A tile is COLUMNS candidates of each part: the searches see it in one line, the sums do not.
    line = tl.arange(0, PARTS * COLUMNS)
    line_part, line_column = line // COLUMNS, line % COLUMNS
    counts += drawn * NUM_PARTS
    candidates += drawn * NUM_PARTS * PART_LEN
    num_candidates = tl.load(counts + line_part, mask=line_part < NUM_PARTS, other=0)
    in_line = candidates + line_part * PART_LEN + line_column
    longest = tl.max(num_candidates, axis=0)
    top_k = tl.load(wholes + slot * _NUM_WHOLES + _TOP_K)
    top_p = tl.load(fractions + slot * _NUM_FRACTIONS + _TOP_P)
    threshold = tl.full((), 0.0, tl.float64)
    part = tl.arange(0, PARTS)
    own_sums = sums + row * NUM_PARTS + part
    if top_k > 0:
        goal = top_k.to(tl.float64)
        threshold = _largest_that_reaches(
            in_line, num_candidates, line_column, longest, threshold, goal, False, COLUMNS
        )
    if top_p < 1.0:
        total = tl.sum(tl.load(own_sums, mask=part < NUM_PARTS, other=0.0), axis=0)
        if top_k > 0:
            kept = tl.zeros((PARTS * COLUMNS,), tl.float64)
            at = 0
            while at < longest:
                is_one = at + line_column < num_candidates
                weights = tl.load(in_line + at, mask=is_one, other=0.0)
                kept += tl.where(weights >= threshold, weights, 0.0)
                at += COLUMNS
            total = tl.sum(kept, axis=0)
        threshold = _largest_that_reaches(
            in_line, num_candidates, line_column, longest, threshold, top_p * total, True, COLUMNS
        )
    min_p = tl.load(fractions + slot * _NUM_FRACTIONS + _MIN_P)
    threshold = tl.maximum(threshold, min_p)  # the largest weight is 1
    tl.store(thresholds + row, threshold)

    column = tl.arange(0, COLUMNS)
    count = tl.load(counts + part, mask=part < NUM_PARTS, other=0)
    table = candidates + part[:, None] * PART_LEN + column[None, :]
    kept_sums = tl.zeros((PARTS,), tl.float64)
    at = 0
    while at < longest:
        weights = tl.load(table + at, mask=at + column[None, :] < count[:, None], other=0.0)
        kept_sums += tl.sum(tl.where(weights >= threshold, weights, 0.0), axis=1)
        at += COLUMNS
    tl.store(own_sums, kept_sums, mask=part < NUM_PARTS)
