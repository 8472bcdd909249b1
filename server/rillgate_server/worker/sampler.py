"""Logits to tokens, reproducibly (contracts, section 5).

The token is the first id whose cumulative probability exceeds u * total, in vocabulary order and
in float64; filters only zero probabilities. Thresholds are values, never ranks, so that equal
logits stand or fall together and no sort order can leak into the result. Nothing of a row depends
on the rows beside it.

Does not know slots' positions in the cache, plans or requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rillgate_server.core.step import TokenLogprobs
from rillgate_server.worker.slot_sampling import SlotSampling
from rillgate_server.worker.token_scores import TokenScores

_NUCLEUS_CANDIDATES = 1024
"""Likeliest tokens that are looked at before a full sort: a nucleus is rarely larger, and picking
1024 out of 150,000 costs a tenth of sorting them. The result is the same."""
_MAX_DRAWN_LOGITS = 1 << 18
"""Logits that are drawn from together: 2 MB in float64, the second-level cache. Four copies of
them live at once, which for 64 rows of 150,000 were 220 MB and 23 ms a row, most of it page faults;
in parts a row takes 5 ms."""
_LOWEST_TEMPERATURE = 1e-100
"""Below it a float64 quotient may overflow; here every draw is long the argmax."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What one row gave."""

    token_id: int | None
    """None: the row has a NaN or no finite logit."""
    logprobs: TokenLogprobs | None = None
    """When the slot asked."""


def sample(logits: Tensor, slots: Sequence[SlotSampling]) -> list[SampledToken]:
    """Draw one token per row.

    logits: [num_rows, vocab_size], any floating type, not changed. slots: one per row, not
    changed (the caller appends the token). Returns one SampledToken per row, in order.
    """
    if not slots:
        return []
    best_values, best_ids = logits.max(dim=-1)  # NaN wins: one reduction tells broken rows, too
    is_sound = torch.isfinite(best_values).tolist()
    token_ids: list[int | None] = [
        token_id if sound else None
        for token_id, sound in zip(best_ids.tolist(), is_sound, strict=True)
    ]
    drawn = [i for i, slot in enumerate(slots) if is_sound[i] and not slot.is_plain_greedy]
    rows_at_once = max(1, _MAX_DRAWN_LOGITS // logits.shape[-1])
    for first in range(0, len(drawn), rows_at_once):
        part = drawn[first : first + rows_at_once]
        draws = _draw(logits[part].double(), [slots[i] for i in part])
        for i, token_id in zip(part, draws, strict=True):
            token_ids[i] = token_id
    return [
        SampledToken(token_id, _logprobs_if_asked(logits[i], token_id, slots[i]))
        for i, token_id in enumerate(token_ids)
    ]


def _logprobs_if_asked(
    row: Tensor, token_id: int | None, slot: SlotSampling
) -> TokenLogprobs | None:
    if slot.params.num_logprobs is None or token_id is None:
        return None
    return TokenScores.of(row[None], [token_id], slot.params.num_logprobs).read()[0]


def _draw(logits: Tensor, slots: Sequence[SlotSampling]) -> list[int | None]:
    """Draw for rows that are not plain argmax. logits: [num_rows, vocab_size], float64, ours.

    A row that ban and bias leave without a finite logit gives None.
    """
    for row, slot in zip(logits, slots, strict=True):
        if slot.changes_logits:
            slot.adjust(row)
    best_values, best_ids = logits.max(dim=-1)
    temperatures = [max(slot.params.temperature, _LOWEST_TEMPERATURE) for slot in slots]
    probabilities = torch.softmax(logits.div_(_column(temperatures, logits)), dim=-1)
    _filter(probabilities, slots)
    cumulative = probabilities.cumsum(dim=-1)
    totals = cumulative[:, -1:]
    targets = _column([slot.next_uniform() for slot in slots], logits) * totals
    targets = targets.minimum(totals.nextafter(torch.zeros_like(totals)))  # u * total may round up
    drawn = torch.searchsorted(cumulative, targets, right=True)[:, 0].tolist()
    return [
        None if not sound else best if slot.params.temperature == 0.0 else token_id
        for slot, sound, best, token_id in zip(
            slots, torch.isfinite(best_values).tolist(), best_ids.tolist(), drawn, strict=True
        )
    ]


def _filter(probabilities: Tensor, slots: Sequence[SlotSampling]) -> None:
    """Zero in place what top_k, then top_p, then min_p drop. [num_rows, vocab_size], float64."""
    vocab_size = probabilities.shape[-1]
    for row, slot in zip(probabilities, slots, strict=True):
        params = slot.params
        if params.temperature == 0.0:
            continue
        if 0 < params.top_k < vocab_size:
            row[row < row.topk(params.top_k).values[-1]] = 0.0
        if params.top_p < 1.0:
            row[row < _nucleus_threshold(row, params.top_p)] = 0.0
        if params.min_p > 0.0:
            row[row < params.min_p * row.max()] = 0.0


def _nucleus_threshold(row: Tensor, top_p: float) -> Tensor:
    """Return the smallest probability of the smallest set of likeliest tokens that reaches top_p.

    row: [vocab_size], float64, not normalised. Looks at a few candidates before all.
    """
    target = top_p * row.sum()
    candidates = row.topk(min(_NUCLEUS_CANDIDATES, row.shape[-1])).values
    cumulative = candidates.cumsum(dim=-1)
    if cumulative[-1] < target:
        candidates = row.sort(descending=True).values
        cumulative = candidates.cumsum(dim=-1)
    last = torch.searchsorted(cumulative, target)  # the first whose sum reaches the target
    return candidates[min(int(last), len(candidates) - 1)]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Return values as [num_rows, 1], with `like`'s type and device."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
