"""Is the cost model's choice between loading and computing as good as the better of both?

The real scheduler on a virtual clock, with costs that were recorded on a real machine.
"""

import pytest

from benchmarks.kv_cache.copies import CopyChannel, CopySpeed
from benchmarks.kv_cache.costs import Recording, TrueCosts, fit
from benchmarks.kv_cache.scenarios import (
    CONVERSATIONS,
    COST_MODEL,
    DECISIONS,
    DEVICE_TIER,
    NO_CACHE,
    Scenario,
)
from benchmarks.kv_cache.simulation import compare, simulate
from rillgate_server.core.clock import VirtualClock
from rillgate_server.core.step import CopyDirection, CopyJob

SEEDS = range(3)


@pytest.fixture(scope="module")
def costs() -> TrueCosts:
    """What steps and copies took on the machine of the recording."""
    return TrueCosts.fit(Recording.load())


@pytest.mark.parametrize("scenario", DECISIONS, ids=lambda scenario: scenario.name)
def test_the_cost_model_is_close_to_the_better_choice(scenario: Scenario, costs: TrueCosts) -> None:
    """At most 3 % more time to the first token than with load-always or recompute-always."""
    assert compare(scenario, costs, SEEDS).ratio <= 1.03


@pytest.mark.parametrize("scenario", DECISIONS, ids=lambda scenario: scenario.name)
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_costs_that_are_wrong_by_two_do_little_harm(
    scenario: Scenario, factor: float, costs: TrueCosts
) -> None:
    """At most 25 % more, when copies are believed to take half or twice as long all the time."""
    assert compare(scenario, costs, SEEDS, factor).ratio <= 1.25


def test_neither_choice_is_the_better_one_everywhere(costs: TrueCosts) -> None:
    """Else a cost model that always says the same would pass."""
    compared = [compare(scenario, costs, range(1)) for scenario in DECISIONS]
    assert any(result.load_s < 0.9 * result.recompute_s for result in compared)
    assert any(result.recompute_s < 0.9 * result.load_s for result in compared)


def test_two_tiers_answer_sooner_than_one_and_than_none(costs: TrueCosts) -> None:
    """The aims of the benchmark, on the virtual clock: 3 times and 1.5 times."""
    none, device, both = (
        simulate(CONVERSATIONS, contestant, costs, seed=0)
        for contestant in (NO_CACHE, DEVICE_TIER, COST_MODEL)
    )
    assert none.median_ttft_s > 3 * both.median_ttft_s
    assert device.median_ttft_s > 1.5 * both.median_ttft_s
    assert none.cached_fraction == 0.0 < device.cached_fraction < both.cached_fraction


def test_copies_go_one_after_the_other() -> None:
    """Each takes latency and bytes; a report may lie about it, the end does not."""
    clock = VirtualClock()
    channel = CopyChannel(clock, block_bytes=100, reported_over_true=2.0)
    for copy_id in (1, 2):
        job = CopyJob(copy_id, CopyDirection.HOST_TO_DEVICE, ((0, 0), (1, 1)))
        channel.begin(job, CopySpeed(latency_s=1.0, bytes_per_s=200.0))
    clock.advance(1.9)
    assert channel.take_finished() == ()
    clock.advance(0.1)
    (first,) = channel.take_finished()
    assert (first.copy_id, first.num_bytes, first.seconds) == (1, 200, 4.0)
    assert channel.next_end_s == 4.0
    clock.advance(2.0)
    assert [done.copy_id for done in channel.take_finished()] == [2]


def test_the_fit_of_a_recording_leaves_late_steps_out() -> None:
    """Known costs, of which one cannot be seen, and a sample that took a hundred times too long."""
    samples = [((1.0, float(n), 0.0), 0.002 + 0.001 * n) for n in range(1, 50)]
    costs = fit([*samples, ((1.0, 10.0, 0.0), 1.2)])
    assert costs == pytest.approx((0.002, 0.001, 0.0), rel=1e-3)
