"""Draws a benchmark's rows; the only place that needs matplotlib.

Owns the picture. Knows nothing of how the numbers came about.
"""

import importlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rillgate.bench.summary import Percentiles, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_matplotlib() -> None:
    """Raise ImportError where nothing can be drawn, before anything is measured."""
    importlib.import_module("matplotlib.figure")


def draw_png(rows: Sequence[Row], x_label: str) -> bytes:
    """Draw throughput and both latencies over the load."""
    # Not at the top: the base install has no matplotlib, and with it importing takes half a second.
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional and slow

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    throughput, ttft, tpot = figure.subplots(1, 3)
    labels = [row.label for row in rows]
    throughput.bar(labels, [row.output_tokens_per_s for row in rows], color="#3b6ea5")
    throughput.set_ylabel("output tokens per second")
    _draw_tails(ttft, labels, [row.ttft_ms for row in rows])
    ttft.set_ylabel("time to first token, ms")
    _draw_tails(tpot, labels, [row.tpot_ms for row in rows])
    tpot.set_ylabel("time per output token, ms")
    for axes in (throughput, ttft, tpot):
        axes.set_xlabel(x_label)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, dpi=150, format="png")
    return png.getvalue()


def _draw_tails(axes: "Axes", labels: Sequence[str], values: Sequence[Percentiles]) -> None:
    for name, numbers in (
        ("median", [value.median for value in values]),
        ("p90", [value.p90 for value in values]),
        ("p99", [value.p99 for value in values]),
    ):
        axes.plot(labels, numbers, marker="o", label=name)
    axes.legend(frameon=False)
