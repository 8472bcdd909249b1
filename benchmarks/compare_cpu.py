"""`make bench`: Rillgate through gRPC beside transformers' own ways, on this machine's CPU.

One random bf16 checkpoint of Qwen2.5-0.5B's shape; the same prompts (128 in, 64 out, no early
end) for everybody; everybody in turn, several rounds in one go, and ratios taken round by round, so
that a drift of a shared machine's speed cancels out. No prompt is sent twice in a server's life.

Rows hold output tokens/s from the first send to the last token. Writes
`benchmarks/results/compare_cpu.json`.
"""

import argparse
import asyncio
import json
import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants.protocol import Contestant
from benchmarks.contestants.rillgate_server import RillgateContestant
from benchmarks.limits import MachineLimits, measure_limits
from benchmarks.random_checkpoint import QWEN_0_5B, make_checkpoint
from benchmarks.results_file import ROOT, write_results

NUM_PROMPT_TOKENS = 128
NUM_OUTPUT_TOKENS = 64
CONCURRENCIES = (1, 4, 16, 32)
TRANSFORMERS = "benchmarks.contestants.transformers_generate"
ENGINE = "benchmarks.contestants.engine_alone"

Prompts = list[list[int]]


@dataclass
class Measurements:
    """What the rounds gave: (who, concurrency) -> one entry per round."""

    rates: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    """Output tokens per second."""
    details: dict[tuple[str, int], list[dict[str, Any]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """Everything else that a contestant said; Any: JSON."""
    limits: list[MachineLimits] = field(default_factory=list)

    def add(self, who: str, concurrency: int, answer: dict[str, Any]) -> None:  # Any: JSON
        """Note one answer and print it."""
        assert answer["num_output_tokens"] % NUM_OUTPUT_TOKENS == 0, answer
        rate = answer["num_output_tokens"] / answer["seconds"]
        self.rates[who, concurrency].append(rate)
        self.details[who, concurrency].append(answer)
        print(f"  {who:12} at {concurrency:2}: {rate:7.1f} tokens/s", flush=True)

    def ratio(self, one: tuple[str, int], other: tuple[str, int]) -> float:
        """Return the median over the rounds of one's rate over the other's."""
        pairs = zip(self.rates[one], self.rates[other], strict=True)
        return statistics.median(a / b for a, b in pairs)


class PromptMaker:
    """Random prompts, none twice."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        """Start the sequence; token ids 0 and 1 are the model's specials."""
        self._random = random.Random(seed)
        self._vocab_size = vocab_size

    def make(self, count: int) -> Prompts:
        """Return `count` new prompts."""
        return [
            [self._random.randrange(2, self._vocab_size) for _ in range(NUM_PROMPT_TOKENS)]
            for _ in range(count)
        ]


def run_round(
    prompts_of: dict[int, Prompts],
    transformers: Contestant,
    engine: Contestant,
    rillgate: RillgateContestant,
    measured: Measurements,
) -> None:
    """Let everybody run once at each concurrency, on the same prompts."""
    measured.limits.append(measure_limits())
    sequential = transformers.ask("sequential", prompts_of[4], NUM_OUTPUT_TOKENS)
    measured.add("sequential", 1, sequential)
    for concurrency in CONCURRENCIES:
        prompts = prompts_of[concurrency]
        answer = asyncio.run(rillgate.ask(prompts, NUM_OUTPUT_TOKENS))
        measured.add("rillgate", concurrency, answer)
        measured.add("engine", concurrency, engine.ask("engine", prompts, NUM_OUTPUT_TOKENS))
        if concurrency > 1:
            static = transformers.ask("static", prompts, NUM_OUTPUT_TOKENS)
            measured.add("static", concurrency, static)
        if concurrency >= 16:
            continuous = transformers.ask("continuous", prompts, NUM_OUTPUT_TOKENS)
            measured.add("continuous", concurrency, continuous)


def ratios(measured: Measurements, shape: dict[str, int]) -> dict[str, float]:
    """Take the ratios that the aims are read from."""
    layers, head = linear_elements(shape)
    found = {
        f"rillgate_over_sequential_{n}": measured.ratio(("rillgate", n), ("sequential", 1))
        for n in CONCURRENCIES
    }
    for n in (16, 32):
        found[f"rillgate_over_static_{n}"] = measured.ratio(("rillgate", n), ("static", n))
        found[f"rillgate_over_transformers_cb_{n}"] = measured.ratio(
            ("rillgate", n), ("continuous", n)
        )
    found["grpc_path_over_engine_32"] = measured.ratio(("rillgate", 32), ("engine", 32))
    found["bandwidth_fraction_1_bf16_cpu"] = statistics.median(
        (layers + head) * 2 / answer["decode_step_s"] / limit.read_bytes_per_s
        for answer, limit in zip(measured.details["engine", 1], measured.limits, strict=True)
    )
    found["prefill_fraction_of_limit_bf16_cpu"] = statistics.median(
        answer["prefill_tokens_per_s"]
        * 2
        * (layers + head / NUM_PROMPT_TOKENS)  # a prompt needs the head for its last token alone
        / limit.bf16_ops_per_s
        for answer, limit in zip(measured.details["engine", 32], measured.limits, strict=True)
    )
    return found


def linear_elements(shape: dict[str, int]) -> tuple[int, int]:
    """Count the weights of the layers' matrices and of the output head."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    kv_size = hidden // heads * shape["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * kv_size + 3 * hidden * shape["intermediate_size"]
    return shape["num_hidden_layers"] * layer, hidden * shape["vocab_size"]


def result_rows(measured: Measurements) -> list[dict[str, Any]]:  # Any: JSON
    """One row per contestant and concurrency, then one for the machine's limits."""
    rows: list[dict[str, Any]] = []
    for (who, concurrency), samples in measured.rates.items():
        details = measured.details[who, concurrency]
        row: dict[str, Any] = {
            "contestant": who,
            "concurrency": concurrency,
            "output_tokens_per_s": round(statistics.median(samples), 2),
            "num_output_tokens": details[0]["num_output_tokens"],
            "samples": [round(sample, 3) for sample in samples],
        }
        extra = set(details[0]) - {"seconds", "num_output_tokens"}
        for key in sorted(extra):
            row[key] = round(statistics.median(detail[key] for detail in details), 5)
        if who == "engine":
            row["decode_tokens_per_s"] = round(concurrency / row["decode_step_s"], 1)
        rows.append(row)
    limits: Sequence[MachineLimits] = measured.limits
    rows.append(
        {
            "contestant": "machine limits",
            "read_gb_per_s": round(statistics.median(x.read_bytes_per_s for x in limits) / 1e9, 2),
            "bf16_gflop_per_s": round(statistics.median(x.bf16_ops_per_s for x in limits) / 1e9, 1),
            "samples": [[round(x.read_bytes_per_s), round(x.bf16_ops_per_s)] for x in limits],
        }
    )
    return rows


def main() -> None:
    """Run the rounds and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of everybody (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default 0)")
    parser.add_argument(
        "--checkpoint", type=Path, default=ROOT / "build" / "bench" / "qwen2.5-0.5b-shape"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    model_dir = str(make_checkpoint(arguments.checkpoint, QWEN_0_5B, torch.bfloat16))
    maker = PromptMaker(QWEN_0_5B["vocab_size"], arguments.seed)
    measured = Measurements()
    transformers = Contestant(TRANSFORMERS, [model_dir])
    engine = Contestant(ENGINE, [model_dir])
    with RillgateContestant(model_dir) as rillgate:
        warm_up = maker.make(2)
        transformers.ask("static", warm_up, 4)
        engine.ask("engine", warm_up, 4)
        asyncio.run(rillgate.ask(warm_up, 4))
        for number in range(1, arguments.rounds + 1):
            print(f"round {number} of {arguments.rounds}", flush=True)
            prompts_of = {concurrency: maker.make(concurrency) for concurrency in CONCURRENCIES}
            run_round(prompts_of, transformers, engine, rillgate, measured)
        memory = rillgate.memory_row()
    transformers.close()
    engine.close()
    rows = [*result_rows(measured), memory]
    found = ratios(measured, QWEN_0_5B)
    path = write_results("compare_cpu", "make bench", rows, found)
    print(json.dumps(json.loads(path.read_text())["ratios"], indent=1))
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
