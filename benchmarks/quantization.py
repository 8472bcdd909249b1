"""What INT8 weights bring: the engine alone, bf16 and int8 in turn, beside the machine's limits.

`python -m benchmarks.quantization` writes `results/quantization.json`. Prompts of 128 tokens, none
twice, 64 tokens out, two threads, a random checkpoint of Qwen2.5-0.5B's shape.

    bandwidth_fraction_1_*      bytes of all weights, at the size they are stored, per decode step
                                of one stream, over what the machine reads
    prefill_fraction_of_limit_* operations of the layers per second of prefill, over the machine's
"""

import argparse
import statistics
from typing import Any

import torch

from benchmarks.compare_cpu import NUM_OUTPUT_TOKENS, PromptMaker, linear_elements
from benchmarks.contestants.engine_alone import EngineContestant
from benchmarks.contestants.protocol import Message
from benchmarks.limits import MachineLimits, measure_limits
from benchmarks.random_checkpoint import QWEN_0_5B, make_checkpoint
from benchmarks.results_file import ROOT, write_results

CHECKPOINT = ROOT / "build" / "bench" / "qwen2.5-0.5b-shape"
CONCURRENCIES = (1, 4, 16, 32)
WEIGHT_BYTES = {"none": 2, "int8": 1}
"""Of a layer's element; the output head has two in both."""

Answers = dict[tuple[str, int], list[dict[str, Any]]]  # (quantization, streams) -> Any: JSON


def measure(num_rounds: int) -> tuple[Answers, list[MachineLimits]]:
    """Let both answer the same prompts, round by round."""
    model_dir = str(make_checkpoint(CHECKPOINT, QWEN_0_5B, torch.bfloat16))
    engines = {name: EngineContestant(model_dir, name) for name in WEIGHT_BYTES}
    maker = PromptMaker(QWEN_0_5B["vocab_size"], seed=0)
    answers: Answers = {}
    limits = []
    for number in range(num_rounds + 1):
        limits.append(measure_limits())
        for streams in CONCURRENCIES:
            prompts = maker.make(streams)
            for name, engine in engines.items():
                request: Message = {"mode": "engine", "prompts": prompts}
                request["num_output_tokens"] = NUM_OUTPUT_TOKENS
                answer = engine.answer(request)
                if number:  # the first round warms up
                    answers.setdefault((name, streams), []).append(answer)
    return answers, limits[1:]


def ratios(answers: Answers, limits: list[MachineLimits]) -> dict[str, float]:
    """Take the medians of the rounds' ratios."""
    layers, head = linear_elements(QWEN_0_5B)
    found = {}
    for streams in CONCURRENCIES:
        pairs = zip(answers["none", streams], answers["int8", streams], strict=True)
        found[f"int8_over_bf16_decode_{streams}"] = statistics.median(
            bf16["decode_step_s"] / int8["decode_step_s"] for bf16, int8 in pairs
        )
    for name, label in (("none", "bf16_dense"), ("int8", "int8")):
        num_bytes = layers * WEIGHT_BYTES[name] + head * 2
        found[f"bandwidth_fraction_1_{label}_cpu_05b"] = statistics.median(
            num_bytes / answer["decode_step_s"] / limit.read_bytes_per_s
            for answer, limit in zip(answers[name, 1], limits, strict=True)
        )
        found[f"prefill_fraction_of_limit_{label}_cpu"] = statistics.median(
            answer["prefill_tokens_per_s"]
            * 2
            * layers
            / (limit.int8_ops_per_s if name == "int8" else limit.bf16_ops_per_s)
            for answer, limit in zip(answers[name, 16], limits, strict=True)
        )
    return found


def rows_of(answers: Answers, limits: list[MachineLimits]) -> list[dict[str, Any]]:  # Any: JSON
    """One row per kind of weights and number of streams, then the machine's limits."""
    rows: list[dict[str, Any]] = []
    for (name, streams), found in answers.items():
        steps_s = [answer["decode_step_s"] for answer in found]
        rows.append(
            {
                "quantization": name,
                "streams": streams,
                "decode_tokens_per_s": round(streams / statistics.median(steps_s), 1),
                "prefill_tokens_per_s": round(
                    statistics.median(answer["prefill_tokens_per_s"] for answer in found), 1
                ),
                "output_tokens_per_s": round(
                    statistics.median(it["num_output_tokens"] / it["seconds"] for it in found), 1
                ),
                "samples": [round(step_s, 5) for step_s in steps_s],
            }
        )
    rows.append(
        {
            "quantization": "machine limits",
            "samples": [
                [round(x.read_bytes_per_s), round(x.bf16_ops_per_s), round(x.int8_ops_per_s)]
                for x in limits
            ],
        }
    )
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="what INT8 weights bring to the engine alone")
    parser.add_argument("--rounds", type=int, default=5)
    num_rounds = parser.parse_args().rounds
    torch.set_num_threads(2)
    answers, limits = measure(num_rounds)
    rows, found = rows_of(answers, limits), ratios(answers, limits)
    for row in rows:
        print({key: value for key, value in row.items() if key != "samples"})
    for name, value in found.items():
        print(f"{name}: {value:.3f}")
    command = f"python -m benchmarks.quantization --rounds {num_rounds}"
    print(write_results("quantization", command, rows, found).name)


if __name__ == "__main__":
    main()
