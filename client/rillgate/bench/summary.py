"""From the samples of a series to one row of numbers.

Owns the definitions of what is reported. Pure: standard library, no clock.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rillgate.bench.measure import Sample


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Median and tail of one quantity; NaN where nothing was measured."""

    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles":
        """Compute all three."""
        return cls(*(percentile(values, fraction) for fraction in (0.5, 0.9, 0.99)))


def percentile(values: Sequence[float], fraction: float) -> float:
    """Interpolate linearly between the two nearest ranks, as numpy does; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True, slots=True)
class Row:
    """One series in numbers."""

    label: str
    """What was varied: the concurrency, or the request rate."""
    num_requests: int
    num_failed: int
    output_tokens: int
    output_tokens_per_s: float
    """From the first send to the last token, over all requests."""
    duration_s: float
    """The same span."""
    ttft_ms: Percentiles
    """Time to first token."""
    tpot_ms: Percentiles
    """Time per output token after the first, per request (of requests with at least two)."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens from the server's prefix cache: 0 where prompts were fresh."""
    preemptions: int
    first_error: str


def summarize(label: str, samples: Sequence[Sample]) -> Row:
    """Reduce the samples; failed requests count as failed, their tokens still count as output."""
    began_s = min((sample.sent_s for sample in samples), default=0.0)
    ended_s = max(
        (sample.last_token_s for sample in samples if sample.last_token_s is not None),
        default=began_s,
    )
    duration_s = ended_s - began_s
    output_tokens = sum(sample.num_output_tokens for sample in samples)
    errors = [sample.error for sample in samples if sample.error]
    good = [sample for sample in samples if not sample.error]
    return Row(
        label=label,
        num_requests=len(samples),
        num_failed=len(errors),
        output_tokens=output_tokens,
        output_tokens_per_s=output_tokens / duration_s if duration_s > 0 else math.nan,
        duration_s=duration_s,
        ttft_ms=Percentiles.of([t for t in map(_ttft_ms, good) if t is not None]),
        tpot_ms=Percentiles.of([t for t in map(_tpot_ms, good) if t is not None]),
        prompt_tokens=sum(sample.num_prompt_tokens for sample in samples),
        cached_tokens=sum(sample.num_cached_tokens for sample in samples),
        preemptions=sum(sample.num_preemptions for sample in samples),
        first_error=errors[0] if errors else "",
    )


def _ttft_ms(sample: Sample) -> float | None:
    if sample.first_token_s is None:
        return None
    return 1000 * (sample.first_token_s - sample.sent_s)


def _tpot_ms(sample: Sample) -> float | None:
    if sample.first_token_s is None or sample.last_token_s is None or sample.num_output_tokens < 2:
        return None
    return 1000 * (sample.last_token_s - sample.first_token_s) / (sample.num_output_tokens - 1)
