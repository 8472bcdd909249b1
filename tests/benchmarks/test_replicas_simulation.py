"""How evenly work spreads, by a short run of the benchmark's simulation; it repeats exactly."""

from dataclasses import replace
from statistics import median

import pytest

from benchmarks.replicas.cluster import Run
from benchmarks.replicas.evenness import (
    AS_PRINTED,
    CONTESTANTS,
    MOVING,
    ROUND_ROBIN,
    SCENARIOS,
    WEIGHTED,
    simulate,
)

SEEDS, RUN_S, WARM_UP_S = range(3), 40.0, 8.0


@pytest.fixture(scope="module")
def runs() -> dict[str, list[Run]]:
    """Everybody on the uneven nodes; by name."""
    return {
        it.name: [simulate(SCENARIOS[0], it, seed, RUN_S, WARM_UP_S) for seed in SEEDS]
        for it in CONTESTANTS
    }


def variation(runs: dict[str, list[Run]], name: str) -> float:
    """Return the median over the seeds."""
    return median(run.load_cv for run in runs[name])


def test_weighted_least_connections_spread_as_evenly_as_the_guide_claims(
    runs: dict[str, list[Run]],
) -> None:
    """At least 40 % better than plain rotation on uneven nodes, with the shares that are free."""
    assert variation(runs, WEIGHTED) < 0.6 * variation(runs, ROUND_ROBIN)


def test_the_formula_as_printed_does_not(runs: dict[str, list[Run]]) -> None:
    """With usage in place of free shares it is no better than rotation, or hardly."""
    assert variation(runs, AS_PRINTED) > 0.8 * variation(runs, ROUND_ROBIN)


def test_prefixes_are_found_and_the_work_still_spreads(runs: dict[str, list[Run]]) -> None:
    """The default finds more of its prompts cached than any other, and answers sooner."""
    for name in (ROUND_ROBIN, WEIGHTED, "least-load"):
        for prefix, other in zip(runs["prefix"], runs[name], strict=True):
            assert prefix.hit_fraction > other.hit_fraction + 0.1
            assert prefix.mean_response_s < other.mean_response_s
    assert variation(runs, "prefix") < 0.75 * variation(runs, ROUND_ROBIN)


def test_waiting_requests_move_to_idle_nodes(runs: dict[str, list[Run]]) -> None:
    """What rotation put on full nodes goes elsewhere, and starts sooner there."""
    for moved, still in zip(runs[MOVING], runs[ROUND_ROBIN], strict=True):
        assert moved.num_moves > 0 == still.num_moves
        assert moved.p99_ttft_s < still.p99_ttft_s


@pytest.mark.parametrize("policy", ["prefix", "least-load"])
def test_one_fit_that_is_far_off_does_not_spoil_the_service(policy: str) -> None:
    """One of eight equal nodes looks a thousand times too fast: answers hardly take longer.

    (Without a limit to speeds it gets nearly all requests, and they take four times as long.)
    """
    (contestant,) = (it for it in CONTESTANTS if it.name == policy)
    equal = SCENARIOS[2]
    wrong = replace(equal.specs[0], fit_error=0.001)
    spoilt = replace(equal, specs=(wrong, *equal.specs[1:]))
    for seed in SEEDS:
        right, other = (
            simulate(it, contestant, seed, RUN_S, WARM_UP_S).mean_response_s
            for it in (equal, spoilt)
        )
        assert other < 1.2 * right


def test_a_seed_gives_the_same_run_again() -> None:
    """Nothing depends on clocks, addresses or the order of sets."""
    one, other = (simulate(SCENARIOS[0], CONTESTANTS[-1], 1, 15.0, 5.0) for _ in range(2))
    assert one == other
