"""What an evaluation says: a table for people, JSON for programs.

Owns both forms. Does not know how anything was measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rillgate_server.cli.evaluate.exact_match import Score
from rillgate_server.cli.evaluate.perplexity import Perplexity
from rillgate_server.worker.weight_bytes import WeightBytes


@dataclass(frozen=True, slots=True)
class Row:
    """One setting and what came out."""

    quantization: str
    dtype: str
    """Of the computation, and of weights that are not quantised."""
    kv_dtype: str
    num_ranks: int
    scores: dict[str, Score]
    """By kind; empty: no tasks were asked."""
    num_failed: int
    """Tasks that the engine gave up."""
    perplexity: Perplexity | None
    weights: WeightBytes
    """Of rank 0, where the model is split."""
    tokens_per_s: float
    """Prompts' and answers' together; how fast this ran, no benchmark."""

    @property
    def overall(self) -> Score | None:
        """Over all kinds."""
        if not self.scores:
            return None
        return Score(
            sum(score.num_right for score in self.scores.values()),
            sum(score.num_tasks for score in self.scores.values()),
        )


def table_of(rows: Sequence[Row]) -> str:
    """Return a table in Markdown, which is as readable in a terminal."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.scores))
    header = ["weights", "type", "cache"]
    header += ["exact match", *kinds] if kinds else []
    header += ["perplexity"] if rows[0].perplexity else []
    header += ["bits", "layers / bf16", "model", "tokens/s"]
    lines = [header, *([*_setting_cells(row), *_measured_cells(row, kinds)] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _setting_cells(row: Row) -> list[str]:
    ranks = f", {row.num_ranks} ranks" if row.num_ranks > 1 else ""
    return [row.quantization + ranks, row.dtype, row.kv_dtype]


def _measured_cells(row: Row, kinds: Sequence[str]) -> list[str]:
    cells = []
    if row.overall is not None:
        overall = f"{row.overall.percent:.1f} % of {row.overall.num_tasks}"
        cells.append(overall + (f", {row.num_failed} failed" if row.num_failed else ""))
        cells += [f"{row.scores[kind].num_right}/{row.scores[kind].num_tasks}" for kind in kinds]
    if row.perplexity is not None:
        cells.append(f"{row.perplexity.value:.4f}")
    return [
        *cells,
        f"{row.weights.bits_per_weight:.2f}",
        f"{100 * row.weights.fraction_of_bf16:.1f} %",
        f"{row.weights.model / 1e6:,.2f} MB",
        f"{row.tokens_per_s:,.0f}",
    ]


def json_of(row: Row) -> dict[str, Any]:  # Any: JSON
    """Return everything that a row has."""
    overall, perplexity = row.overall, row.perplexity
    return {
        "quantization": row.quantization,
        "dtype": row.dtype,
        "kv_dtype": row.kv_dtype,
        "num_ranks": row.num_ranks,
        "exact_match": None if overall is None else _score_json(overall),
        "exact_match_by_kind": {kind: _score_json(score) for kind, score in row.scores.items()},
        "num_failed": row.num_failed,
        "perplexity": None if perplexity is None else _perplexity_json(perplexity),
        "bits_per_weight": round(row.weights.bits_per_weight, 3),
        "layer_bytes": row.weights.layers,
        "layer_bytes_in_bf16": row.weights.layers_in_bf16,
        "model_bytes": row.weights.model,
        "tokens_per_s": round(row.tokens_per_s, 1),
    }


def _score_json(score: Score) -> dict[str, Any]:  # Any: JSON
    return {
        "num_right": score.num_right,
        "num_tasks": score.num_tasks,
        "percent": round(score.percent, 2),
    }


def _perplexity_json(perplexity: Perplexity) -> dict[str, Any]:  # Any: JSON
    is_number = math.isfinite(perplexity.mean_nll)
    return {
        "perplexity": perplexity.value if is_number else None,
        "mean_nll_nats": perplexity.mean_nll if is_number else None,
        "num_tokens": perplexity.num_tokens,
    }
