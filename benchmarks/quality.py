"""What quantised weights and an INT8 cache cost in answers: the bundled model, setting by setting.

`python -m benchmarks.quality` writes `results/quality.json`: what `rillgate evaluate` measures on
all held-out tasks and on the held-out text, beside the model, at a context of 512 tokens (it was
trained on conversations of up to 1,000; see its card).

    *_points_below_bf16         exact match of `none` in bfloat16 less that of the setting
    *_nll_over_bf16             mean negative log-likelihood over that of `none` in bfloat16
    *_layer_bytes_over_bf16     of the decoder's linear layers
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.results_file import write_results
from rillgate_server.cli.evaluate.command import evaluate, read_material
from rillgate_server.cli.evaluate.report import Row, json_of, table_of
from rillgate_server.cli.evaluate.variants import read_variants
from rillgate_server.config.groups import QUANTIZATIONS
from rillgate_server.config.settings import bundled_model_dir, load_settings

CONTEXT = 512
_SETTINGS = {"model": {"max_context_tokens": str(CONTEXT)}}


def label_of(row: Row) -> str:
    """Return what a ratio's name begins with."""
    parts = [row.quantization.replace("-", "_")]
    parts += [row.dtype] if row.dtype != "bfloat16" else []
    parts += ["cache_int8"] if row.kv_dtype == "int8" else []
    return "_".join(parts)


def ratios_of(rows: list[Row]) -> dict[str, float]:
    """Compare each row with the first, which is bfloat16."""
    found: dict[str, float] = {}
    exact = rows[0]
    assert exact.overall is not None
    assert exact.perplexity is not None
    for row in rows[1:]:
        assert row.overall is not None
        assert row.perplexity is not None
        label = label_of(row)
        found[f"{label}_points_below_bf16"] = exact.overall.percent - row.overall.percent
        found[f"{label}_nll_over_bf16"] = row.perplexity.mean_nll / exact.perplexity.mean_nll
        found[f"{label}_layer_bytes_over_bf16"] = row.weights.fraction_of_bf16
    return found


def result_row(row: Row) -> dict[str, Any]:  # Any: JSON
    """Return a row with its raw counts: right ones and tasks, kind by kind."""
    samples = [[kind, score.num_right, score.num_tasks] for kind, score in row.scores.items()]
    return json_of(row) | {"samples": samples}


def main() -> None:
    """Measure, print, write."""
    quantised = [name for name in QUANTIZATIONS if name != "none"]
    default = ",".join(["none", "none+float32", *quantised, "int8-cache", "int8+int8-cache"])
    parser = argparse.ArgumentParser(description="what each setting costs in answers")
    parser.add_argument("--compare", default=default, help="rows; the first is `none`")
    compare = parser.parse_args().compare
    model_dir = bundled_model_dir()
    flags = argparse.Namespace(
        tasks=None, num_tasks=None, max_tokens=CONTEXT, text=model_dir / "held_out_text.txt"
    )
    variants = read_variants(load_settings(None, _SETTINGS), compare)
    rows = evaluate(variants, Path(model_dir), read_material(model_dir, flags))
    print(table_of(rows))
    command = "python -m benchmarks.quality"
    command += "" if compare == default else f" --compare {compare}"
    print(write_results("quality", command, [result_row(it) for it in rows], ratios_of(rows)).name)


if __name__ == "__main__":
    main()
