"""Load or recompute, swap or drop, save or wait: decided by predicted seconds."""

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from rillgate_server.core.step import CopyDirection
from rillgate_server.kvcache.cost_model import CostModel, StepWork
from rillgate_server.kvcache.tier_plan import (
    FIRST_STORE_BLOCKS,
    MAX_STORE_BLOCKS,
    PROBE_BLOCKS,
    PROBE_INTERVAL,
    CachePolicy,
    TierPlan,
    cheapest_cut,
)

SIZE = 16
BLOCK_BYTES = 1 << 20
TOKEN_S = 1e-3
BLOCK_COMPUTE_S = SIZE * TOKEN_S


def measured(load_block_s: float, store_block_s: float = 1e-3) -> CostModel:
    """Return costs that have seen prefills of TOKEN_S a token, and copies."""
    costs = CostModel()
    for num_tokens in (64, 128, 256) * 20:
        costs.step_done(StepWork(num_prefill_tokens=num_tokens), num_tokens * TOKEN_S)
    for num_blocks in (1, 2, 4, 8) * 10:
        num_bytes = num_blocks * BLOCK_BYTES
        costs.copy_done(CopyDirection.HOST_TO_DEVICE, num_bytes, num_blocks * load_block_s)
        costs.copy_done(CopyDirection.DEVICE_TO_HOST, num_bytes, num_blocks * store_block_s)
    return costs


def plan(costs: CostModel, load_policy: str = "auto") -> TierPlan:
    """Build the decider over these costs."""
    return TierPlan(CachePolicy(SIZE, BLOCK_BYTES, b"", load_policy=load_policy), costs)


def load_s(costs: CostModel) -> Callable[[int], float]:
    """Predict loads with nothing before them."""
    return lambda num_blocks: costs.load_s(num_blocks * BLOCK_BYTES)


@given(
    st.lists(st.booleans(), min_size=1, max_size=40),
    st.floats(0, 5),
    st.floats(0, 2),
    st.floats(0, 1),
    st.floats(0, 0.1),
    st.integers(1, 20),
)
def test_the_cut_is_the_best_of_all_cuts(
    is_on_device: list[bool],
    latency: float,
    per_block: float,
    per_token: float,
    per_context: float,
    num_behind: int,
) -> None:
    """Comparing the ends of runs alone gives what comparing every position gives."""
    num_tokens = len(is_on_device) + num_behind

    def compute(num_used: int) -> float:
        own = num_tokens - num_used
        return per_token * own + per_context * (own * num_used + own * (own + 1) / 2)

    def load(num_blocks: int) -> float:
        return latency + per_block * num_blocks

    def seconds(cut: int) -> float:
        num_to_load = is_on_device[:cut].count(False)
        return (load(num_to_load) if num_to_load else 0.0) + compute(cut)

    chosen = cheapest_cut(is_on_device, load, compute)
    best = min(map(seconds, range(len(is_on_device) + 1)))
    assert seconds(chosen.num_blocks) <= best + 1e-9 * (1 + best)
    assert abs(chosen.predicted_s - seconds(chosen.num_blocks)) <= 1e-9 * (1 + best)


def test_a_fast_host_tier_is_loaded_and_a_slow_one_is_not() -> None:
    """The whole chain is used where loading is faster; the device's own beginning otherwise."""
    chain = [True, True, False, False, True, False]
    fast, slow = measured(BLOCK_COMPUTE_S / 10), measured(BLOCK_COMPUTE_S * 10)
    assert plan(fast).choose_cut(chain, 200, load_s(fast)) == 6
    assert plan(slow).choose_cut(chain, 200, load_s(slow)) == 2


def test_device_blocks_behind_a_short_gap_make_its_load_pay() -> None:
    """A block that is slower to load than to compute is loaded when ten others hang on it."""
    costs = measured(BLOCK_COMPUTE_S * 3)
    assert plan(costs).choose_cut([False], 20, load_s(costs)) == 0
    assert plan(costs).choose_cut([False] + [True] * 10, 200, load_s(costs)) == 11


def test_whom_computing_delays_counts_and_loading_delays_nobody() -> None:
    """A load that takes twice as long as computing pays when two others wait."""
    costs = measured(BLOCK_COMPUTE_S * 2)
    chain = [False] * 8
    decider = plan(costs)
    assert decider.choose_cut(chain, 8 * SIZE + 1, load_s(costs)) == 0
    assert decider.choose_cut(chain, 8 * SIZE + 1, load_s(costs), num_delayed=2.0) == 8


def test_without_measurements_everything_is_loaded() -> None:
    """So the first loads give the measurements."""
    costs = CostModel()
    assert plan(costs).choose_cut([True, False, False], 50, load_s(costs)) == 3


def test_the_operators_policy_is_not_weighed() -> None:
    """`load` loads from a slow tier, `recompute` leaves a fast one alone."""
    slow, fast = measured(BLOCK_COMPUTE_S * 10), measured(BLOCK_COMPUTE_S / 10)
    chain = [True, False, False]
    assert plan(slow, "load").choose_cut(chain, 50, load_s(slow)) == 3
    assert plan(fast, "recompute").choose_cut(chain, 50, load_s(fast)) == 1


def test_a_slow_tier_is_tried_again_now_and_then_with_little() -> None:
    """Every PROBE_INTERVAL-th recompute loads a few blocks, however many there are."""
    costs = measured(BLOCK_COMPUTE_S * 10)
    decider = plan(costs)
    cuts = []
    for _ in range(2 * PROBE_INTERVAL):
        cut = decider.choose_cut([False] * 50, 1000, load_s(costs))
        decider.note_start(cut, 50 - cut)
        cuts.append(cut)
    assert [cut for cut in cuts if cut] == [PROBE_BLOCKS, PROBE_BLOCKS]
    assert decider.decisions().num_recomputes == 2 * PROBE_INTERVAL
    assert decider.decisions().num_loaded_tokens == 2 * PROBE_BLOCKS * SIZE


def test_a_probe_that_loads_all_there_is_comes_no_more_often() -> None:
    """Short prefixes: nothing is left to compute, and still the next ones are computed again."""
    costs = measured(BLOCK_COMPUTE_S * 10)
    decider = plan(costs)
    cuts = []
    for _ in range(3 * PROBE_INTERVAL):
        cut = decider.choose_cut([False] * 2, 2 * SIZE + 1, load_s(costs))
        decider.note_start(cut, 2 - cut)
        cuts.append(cut)
    assert [cut for cut in cuts if cut] == [2, 2, 2]


def test_a_throttled_copy_changes_the_decision_within_20_copies() -> None:
    """A bus that becomes 30 times slower is found out by what is loaded meanwhile."""
    costs = measured(BLOCK_COMPUTE_S / 10)
    decider = plan(costs)
    chain = [False] * 8
    num_copies = 0
    while decider.choose_cut(chain, 8 * SIZE + 1, load_s(costs)):
        costs.copy_done(CopyDirection.HOST_TO_DEVICE, 8 * BLOCK_BYTES, 8 * BLOCK_COMPUTE_S * 3)
        num_copies += 1
        assert num_copies <= 20


def test_a_victim_is_swapped_where_loading_beats_computing() -> None:
    """And its blocks are dropped where it does not, or where there is no host tier."""
    fast, slow = plan(measured(BLOCK_COMPUTE_S / 10)), plan(measured(BLOCK_COMPUTE_S * 10))
    assert fast.choose_swap(10, 165, has_host=True)
    assert not slow.choose_swap(10, 165, has_host=True)
    assert not fast.choose_swap(10, 165, has_host=False)
    assert fast.decisions().num_swap_preemptions == 1
    assert fast.decisions().num_recompute_preemptions == 1


def test_the_cheapest_way_back_is_what_a_restart_costs() -> None:
    """Loading where there is a host tier and it is faster, computing otherwise."""
    costs = measured(BLOCK_COMPUTE_S / 10)
    with_host = plan(costs).restart_s(10, 160, has_host=True)
    without = plan(costs).restart_s(10, 160, has_host=False)
    assert with_host == costs.load_s(10 * BLOCK_BYTES) < without == costs.prefill_s(0, 160)


def test_little_is_saved_while_loading_does_not_pay() -> None:
    """Enough for a probe to find; an operator who wants loads gets them."""
    slow = measured(BLOCK_COMPUTE_S * 10)
    assert plan(slow).max_store_blocks() == PROBE_BLOCKS
    assert plan(slow, "load").max_store_blocks() == MAX_STORE_BLOCKS
    assert plan(CostModel()).max_store_blocks() == FIRST_STORE_BLOCKS
    assert plan(measured(BLOCK_COMPUTE_S / 10)).max_store_blocks() == MAX_STORE_BLOCKS


def test_a_block_is_saved_early_after_as_many_hits_as_saving_costs_computings() -> None:
    """At once where saving is cheap; later where it is dear."""
    assert plan(measured(1e-3, BLOCK_COMPUTE_S / 4)).reuse_threshold() == 1
    assert plan(measured(1e-3, BLOCK_COMPUTE_S * 2.5)).reuse_threshold() == 3
    assert plan(CostModel()).reuse_threshold() == 2
