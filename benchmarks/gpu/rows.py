"""A row of the result, and the figures that more than one question puts into it."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]  # Any: JSON; always with `what` and `samples`
BEGAN, DID_NOT_END = "began", "did not end"
"""`what` of a row that a later one replaces; of one that was never replaced."""
PERCENTILES = (50, 90, 95, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that so many percent of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def distribution_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50 … p99 and the largest, in milliseconds."""
    found = {f"p{percent}": percentile(seconds, percent) for percent in PERCENTILES}
    found["max"] = max(seconds)
    return {name: round(value * 1e3, 1) for name, value in found.items()}


def find(rows: Sequence[Row], part: str, **columns: object) -> Row | None:
    """Return the last row of a part that has these columns; None without one."""
    for row in reversed(rows):
        if row.get("part") == part and _has(row, columns):
            return row
    return None


def _has(row: Row, columns: Mapping[str, object]) -> bool:
    return all(row.get(name) == value for name, value in columns.items())
