"""What a benchmark reports: the cells of a table, and JSON.

Owns the two forms. Knows nothing of how the numbers came about.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from rillgate.bench.measure import Sample
from rillgate.bench.summary import Percentiles, Row

# ttft: time to first token; tpot: time per output token after the first; medians first.
HEADERS = (
    "load",
    "sent",
    "failed",
    "out tok/s",
    "ttft ms",
    "p90",
    "p99",
    "tpot ms",
    "p90",
    "p99",
    "cached",
    "preempt",
)


def cells(row: Row) -> tuple[str, ...]:
    """Write a row for the table under HEADERS."""
    return (
        row.label,
        str(row.num_requests),
        str(row.num_failed),
        _number(row.output_tokens_per_s),
        *_three(row.ttft_ms),
        *_three(row.tpot_ms),
        str(row.cached_tokens),
        str(row.preemptions),
    )


def _three(percentiles: Percentiles) -> tuple[str, ...]:
    return tuple(map(_number, (percentiles.median, percentiles.p90, percentiles.p99)))


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def to_json(
    settings: Mapping[str, object], rows: Sequence[tuple[Row, Sequence[Sample]]]
) -> dict[str, object]:
    """Collect settings, rows and raw samples; what was not measured is null."""
    return {
        "settings": dict(settings),
        "rows": [
            {
                **_plain(dataclasses.asdict(row)),
                "samples": [_plain(dataclasses.asdict(sample)) for sample in samples],
            }
            for row, samples in rows
        ],
    }


def _plain(values: Mapping[str, object]) -> dict[str, object]:
    """Put null for NaN, which JSON does not have."""
    return {
        name: _plain(value)
        if isinstance(value, dict)
        else None
        if isinstance(value, float) and math.isnan(value)
        else value
        for name, value in values.items()
    }
