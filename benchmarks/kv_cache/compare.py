"""`make bench-kv`: what the two-tier cache and its cost model are worth on this machine.

A random model of hidden 256, 8 layers and a vocabulary of 4096 serves conversations in a closed
loop (benchmarks.kv_cache.workload). Everybody in turn within one run, several rounds; ratios are
taken round by round, so that a drift of a shared machine's speed cancels out.

    conversations     no cache, device tier alone, both tiers with load-always, with the cost model
    short prefixes,   load-always, recompute-always and the cost model: by wall clock, and on a
    long ones,        virtual clock with the costs that this run recorded
    a slow tier

Writes `benchmarks/results/kv_cache.json`; with --record also the recorded costs that the tests
simulate with.
"""

import argparse
import gc
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.kv_cache.costs import Recording, TrueCosts
from benchmarks.kv_cache.engine import run
from benchmarks.kv_cache.run import RunResult
from benchmarks.kv_cache.scenarios import (
    CONVERSATIONS,
    COST_MODEL,
    DECISIONS,
    DEVICE_TIER,
    LOAD_ALWAYS,
    LONG_PREFIXES,
    NO_CACHE,
    RECOMPUTE_ALWAYS,
    Contestant,
    Scenario,
)
from benchmarks.kv_cache.simulation import Comparison, compare
from benchmarks.random_checkpoint import make_checkpoint
from benchmarks.results_file import write_results
from rillgate_server.worker.worker import Worker, WorkerOptions

SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 4096,
}
NUM_ROUNDS = 3
NUM_DECISION_ROUNDS = 7
SIMULATED_SEEDS = range(5)
WRONG_FACTORS = (0.5, 2.0)
"""What copies are believed to take over what they take."""
CONVERSATION_CONTESTANTS = (NO_CACHE, DEVICE_TIER, LOAD_ALWAYS, COST_MODEL)
DECISION_CONTESTANTS = (LOAD_ALWAYS, RECOMPUTE_ALWAYS, COST_MODEL)

Row = dict[str, Any]  # Any: JSON


class Measurements:
    """Results of all rounds: (scenario, contestant) -> one per round."""

    def __init__(self) -> None:
        self._results: dict[tuple[str, str], list[RunResult]] = defaultdict(list)

    def add(self, scenario: Scenario, contestant: Contestant, result: RunResult) -> None:
        """Note one result and print it."""
        self._results[scenario.name, contestant.name].append(result)
        print(
            f"  {scenario.name:15} {contestant.name:17} first token: median "
            f"{result.median_ttft_s * 1e3:7.1f} ms, mean {result.mean_ttft_s * 1e3:7.1f} ms; "
            f"{result.output_tokens_per_s:6.1f} tokens/s, {result.cached_fraction:.0%} cached",
            flush=True,
        )

    def median_ratio(self, scenario: Scenario, one: Contestant, other: Contestant) -> float:
        """Return the median over the rounds of one's median time to first token over other's."""
        pairs = self._pairs(scenario, one, other)
        return statistics.median(a.median_ttft_s / b.median_ttft_s for a, b in pairs)

    def cost_model_ratio(self, scenario: Scenario) -> float:
        """Return the median over the rounds of the cost model's mean time over the better way's.

        The better one is the same in all rounds: the best of each would win by its luck alone.
        """
        return max(
            statistics.median(
                a.mean_ttft_s / b.mean_ttft_s
                for a, b in self._pairs(scenario, COST_MODEL, contestant)
            )
            for contestant in (LOAD_ALWAYS, RECOMPUTE_ALWAYS)
        )

    def rows(self) -> list[Row]:
        """Return everything that was measured, for the result file."""
        return [
            {
                "scenario": scenario,
                "contestant": contestant,
                "unit": "milliseconds to the first token on turns 2 and later, median of a run",
                "median": round(statistics.median(_ttfts_ms(results)), 2),
                "samples": _ttfts_ms(results),
                "mean_ms": [round(result.mean_ttft_s * 1e3, 2) for result in results],
                "output_tokens_per_s": [round(result.output_tokens_per_s, 1) for result in results],
                "cached_fraction": [round(result.cached_fraction, 3) for result in results],
                "host_tier_tokens": [result.load.host.num_hit_tokens for result in results],
                "recomputed_tokens": [
                    result.load.decisions.num_recomputed_tokens for result in results
                ],
            }
            for (scenario, contestant), results in self._results.items()
        ]

    def _pairs(
        self, scenario: Scenario, one: Contestant, other: Contestant
    ) -> list[tuple[RunResult, RunResult]]:
        results = (self._results[scenario.name, contestant.name] for contestant in (one, other))
        return list(zip(*results, strict=True))


def _ttfts_ms(results: list[RunResult]) -> list[float]:
    return [round(result.median_ttft_s * 1e3, 2) for result in results]


def measure(
    worker: Worker, num_rounds: int, num_decision_rounds: int
) -> tuple[Measurements, Recording]:
    """Let everybody have a turn in each round; return the results, and what the steps took."""
    measured, recording = Measurements(), Recording(worker.layout.block_bytes)
    warm_up = run(worker, LONG_PREFIXES, RECOMPUTE_ALWAYS, seed=99)
    prefill_tokens_per_s = warm_up.load.prefill_tokens_per_s
    plan: list[tuple[Scenario, tuple[Contestant, ...], int]] = [
        (CONVERSATIONS, CONVERSATION_CONTESTANTS, num_rounds),
        *((scenario, DECISION_CONTESTANTS, num_decision_rounds) for scenario in DECISIONS),
    ]
    for scenario, contestants, count in plan:
        for number in range(count):
            print(f"{scenario.name}, round {number + 1} of {count}", flush=True)
            for contestant in contestants if number % 2 else reversed(contestants):
                gc.collect()
                speed = scenario.host_speed(prefill_tokens_per_s, worker.layout.block_bytes)
                recorded = recording if number == 0 and speed is None else None
                result = run(worker, scenario, contestant, number, speed, recorded)
                measured.add(scenario, contestant, result)
    return measured, recording


def simulate_decisions(costs: TrueCosts) -> tuple[list[Row], dict[str, float]]:
    """Compare the cost model in simulation, with right and with wrong beliefs."""
    rows: list[Row] = []
    right: dict[str, float] = {}
    wrong: list[float] = []
    for scenario in DECISIONS:
        for factor in (1.0, *WRONG_FACTORS):
            compared = compare(scenario, costs, SIMULATED_SEEDS, factor)
            rows.append(_simulated_row(scenario, factor, compared))
            print(f"  simulated {scenario.name}, copies x {factor}: {compared.ratio:.3f}")
            if factor == 1.0:
                right[scenario.name] = compared.ratio
            else:
                wrong.append(compared.ratio)
    ratios = {
        "cost_model_over_better_simulated": max(right.values()),
        "cost_model_over_better_simulated_costs_wrong_by_2": max(wrong),
    }
    ratios |= {f"cost_model_over_better_simulated_{name}": value for name, value in right.items()}
    return rows, ratios


def _simulated_row(scenario: Scenario, factor: float, compared: Comparison) -> Row:
    return {
        "scenario": f"{scenario.name}, simulated",
        "believed_copies_over_true": factor,
        "unit": "milliseconds to the first token on turns 2 and later, mean over several seeds: "
        "load-always, recompute-always, the cost model",
        "samples": [
            round(seconds * 1e3, 3)
            for seconds in (compared.load_s, compared.recompute_s, compared.cost_model_s)
        ],
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description="measure the two-tier cache")
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--decision-rounds", type=int, default=NUM_DECISION_ROUNDS)
    parser.add_argument("--threads", type=int, default=2, help="of the computation")
    parser.add_argument("--record", action="store_true", help="keep the costs for the tests")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = make_checkpoint(Path(directory), SHAPE, torch.bfloat16)
        worker = Worker.load(checkpoint, WorkerOptions(num_threads=options.threads))
    measured, recording = measure(worker, options.rounds, options.decision_rounds)
    if options.record:
        recording.save()
    rows, ratios = simulate_decisions(TrueCosts.fit(recording))
    wall = {scenario.name: measured.cost_model_ratio(scenario) for scenario in DECISIONS}
    ratios |= {
        "ttft_no_cache_over_two_tiers": measured.median_ratio(CONVERSATIONS, NO_CACHE, COST_MODEL),
        "ttft_device_tier_over_two_tiers": measured.median_ratio(
            CONVERSATIONS, DEVICE_TIER, COST_MODEL
        ),
        "cost_model_over_better_wall": max(wall.values()),
    }
    ratios |= {f"cost_model_over_better_wall_{name}": value for name, value in wall.items()}
    command = (
        f"python -m benchmarks.kv_cache.compare --rounds {options.rounds} "
        f"--decision-rounds {options.decision_rounds} --threads {options.threads}"
    )
    path = write_results("kv_cache", command, measured.rows() + rows, ratios)
    for name, ratio in sorted(ratios.items()):
        print(f"{name}: {ratio:.3f}")
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
