"""`make bench-replicas`: what many replicas bring and cost; writes `results/replicas.json`.

Runs the parts one after another, each in a module of its own that can be run alone:

    routing_cost   what routing takes per request                   routing_us
    throughput     two replicas over one, fake and real             two_replicas_over_one{_fake,}
    failover       kill -9 to the next token of what moved          kill_to_next_token_ms
    evenness       how evenly the policies spread work (simulated)  evenness_*_over_round_robin
"""

import argparse

from benchmarks.replicas import evenness, failover, routing_cost, throughput
from benchmarks.results_file import write_results


def main() -> None:
    """Measure everything and write the result."""
    parser = argparse.ArgumentParser(description="measure what many replicas bring and cost")
    parser.add_argument("--rounds", type=int, default=throughput.NUM_ROUNDS, help="of throughput")
    parser.add_argument("--kills", type=int, default=failover.NUM_KILLS)
    parser.add_argument("--seeds", type=int, default=len(evenness.SEEDS), help="of simulations")
    options = parser.parse_args()
    parts = (
        routing_cost.measure(),
        throughput.measure(options.rounds),
        failover.measure(options.kills),
        evenness.measure(range(options.seeds)),
    )
    rows = [row for found, _ in parts for row in found]
    ratios = {name: value for _, found in parts for name, value in found.items()}
    command = (
        f"python -m benchmarks.replicas.compare --rounds {options.rounds} "
        f"--kills {options.kills} --seeds {options.seeds}"
    )
    path = write_results("replicas", command, rows, ratios)
    for name, ratio in sorted(ratios.items()):
        print(f"{name}: {ratio:.3f}")
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
