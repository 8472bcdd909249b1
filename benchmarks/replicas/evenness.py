"""How evenly each routing policy spreads work: uneven and equal nodes under uneven requests.

Owns the contestants, the clusters that they run on, and the table. The simulation is
benchmarks.replicas.cluster's; every contestant meets the same users, seed by seed, and ratios are
taken seed by seed.

The deployment guide claims that weighted least connections spreads 40 % more evenly than plain
rotation: that would be a ratio of 0.6.
"""

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import Any

from benchmarks.replicas.cluster import WELCOME, Cluster, Contestant, Run
from benchmarks.replicas.node import NodeSpec
from benchmarks.replicas.traffic import Shape, Traffic
from rillgate_server.core.load import EngineLoad
from rillgate_server.routing.policies import POLICIES

RUN_S, WARM_UP_S = 60.0, 10.0
SEEDS = range(9)
ROUND_ROBIN, WEIGHTED = "round-robin", "weighted-least-connections"
AS_PRINTED = "weighted-least-connections, usage as printed"
MOVING = "round-robin, waiting ones move"

Row = dict[str, Any]  # Any: JSON


@dataclass(frozen=True, slots=True)
class Scenario:
    """Machines, and how many come to them."""

    name: str
    specs: tuple[NodeSpec, ...]
    conversations_per_s: float


def swap_shares(load: EngineLoad) -> EngineLoad:
    """Say what is in use where a Load says what is free, as the guide prints its formula."""
    return replace(
        load,
        free_device_fraction=1 - load.free_device_fraction,
        free_cpu_fraction=1 - load.free_cpu_fraction,
    )


CONTESTANTS = (
    Contestant(ROUND_ROBIN, POLICIES[ROUND_ROBIN]),
    Contestant(WEIGHTED, POLICIES[WEIGHTED]),
    Contestant(AS_PRINTED, POLICIES[WEIGHTED], swap_shares),
    Contestant("least-load", POLICIES["least-load"]),
    Contestant("prefix", POLICIES["prefix"]),
    Contestant(MOVING, POLICIES[ROUND_ROBIN], moves_waiting=True),
)


def _fit_errors(num_nodes: int) -> list[float]:
    """Draw what fits are off by: as much as those of equal machines that share their cores."""
    draw = random.Random("fits")
    return [draw.uniform(0.85, 1.15) for _ in range(num_nodes)]


def uneven_nodes() -> tuple[NodeSpec, ...]:
    """Return eight nodes of three generations; other programs run on some."""
    speeds = (1.0, 1.0, 1.0, 0.6, 0.6, 0.6, 0.35, 0.35)
    blocks = (6000, 6000, 3000, 4000, 4000, 2000, 1500, 1500)
    cpu = (0.0, 0.3, 0.1, 0.0, 0.5, 0.1, 0.0, 0.4)
    return tuple(
        NodeSpec(f"n{i}", speed, num_blocks, 64, background, error)
        for i, (speed, num_blocks, background, error) in enumerate(
            zip(speeds, blocks, cpu, _fit_errors(8), strict=True)
        )
    )


def equal_nodes() -> tuple[NodeSpec, ...]:
    """Return eight nodes that differ only in what their fits say."""
    return tuple(
        NodeSpec(f"n{i}", 0.7, 4000, 64, 0.1, error) for i, error in enumerate(_fit_errors(8))
    )


SCENARIOS = (
    Scenario("uneven nodes", uneven_nodes(), 9.0),
    Scenario("uneven nodes, nearly full", uneven_nodes(), 16.0),
    Scenario("equal nodes", equal_nodes(), 9.0),
)


def simulate(
    scenario: Scenario, contestant: Contestant, seed: int, run_s: float, warm_up_s: float
) -> Run:
    """Run one contestant once."""
    traffic = Traffic(seed, Shape(scenario.conversations_per_s), WELCOME)
    return Cluster(scenario.specs, contestant, traffic, seed).run(run_s, warm_up_s)


Runs = Mapping[tuple[str, str], Sequence[Run]]
"""(scenario, contestant) -> one run per seed."""


def simulate_all(seeds: Sequence[int], run_s: float) -> Runs:
    """Run everybody in every scenario, and print the table."""
    runs: dict[tuple[str, str], list[Run]] = {}
    for scenario in SCENARIOS:
        print(f"{scenario.name}: median of {len(seeds)} seeds (least to most of load's variation)")
        for contestant in CONTESTANTS:
            found = [simulate(scenario, contestant, seed, run_s, WARM_UP_S) for seed in seeds]
            runs[scenario.name, contestant.name] = found
            print(_line(contestant.name, found), flush=True)
    return runs


def _line(name: str, runs: Sequence[Run]) -> str:
    middle = {it.name: median(getattr(run, it.name) for run in runs) for it in fields(Run)}
    variations = sorted(run.load_cv for run in runs)
    return (
        f"  {name:45} variation of load {middle['load_cv']:.2f} ({variations[0]:.2f} to "
        f"{variations[-1]:.2f}), of memory {middle['memory_cv']:.2f}; response mean "
        f"{middle['mean_response_s']:6.2f} s, p99 {middle['p99_response_s']:6.2f} s; first token "
        f"p99 {middle['p99_ttft_s']:6.2f} s; {middle['hit_fraction']:.0%} of prompts cached; "
        f"{middle['num_requests']:.0f} requests, {middle['num_moves']:.0f} moved"
    )


def evenness_ratios(runs: Runs) -> dict[str, list[float]]:
    """Return per seed each contestant's variation of load over rotation's, on uneven nodes."""
    base = runs[SCENARIOS[0].name, ROUND_ROBIN]
    names = {"wlc": WEIGHTED, "wlc_as_printed": AS_PRINTED, "least_load": "least-load"}
    names["prefix"] = "prefix"
    return {
        f"evenness_{short}_over_round_robin": [
            run.load_cv / rotation.load_cv
            for run, rotation in zip(runs[SCENARIOS[0].name, name], base, strict=True)
        ]
        for short, name in names.items()
    }


def measure(
    seeds: Sequence[int] = SEEDS, run_s: float = RUN_S
) -> tuple[list[Row], dict[str, float]]:
    """Return rows and ratios for the result file."""
    runs = simulate_all(seeds, run_s)
    rows: list[Row] = [
        {
            "what": f"evenness, {scenario}: {name}",
            "unit": "coefficient of variation over 8 nodes of the seconds of work in them, "
            "mean over time; one sample per seed",
            "median": round(median(run.load_cv for run in found), 4),
            "samples": [round(run.load_cv, 4) for run in found],
            **{
                it.name: [round(getattr(run, it.name), 4) for run in found]
                for it in fields(Run)
                if it.name != "load_cv"
            },
        }
        for (scenario, name), found in runs.items()
    ]
    samples = evenness_ratios(runs)
    for name, found in samples.items():
        print(f"{name}: {median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
        rows.append({"what": name, "samples": [round(it, 4) for it in found]})
    return rows, {name: median(found) for name, found in samples.items()}


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description="how evenly the routing policies spread work")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--seconds", type=float, default=RUN_S, help="simulated, per run")
    options = parser.parse_args()
    measure(range(options.seeds), options.seconds)


if __name__ == "__main__":
    main()
