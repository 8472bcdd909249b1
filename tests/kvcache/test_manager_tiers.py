"""The cache manager over both tiers: saving, loading, deciding."""

import pytest

from rillgate_server.kvcache.cost_model import StepWork
from tests.support.cache import BLOCK_BYTES, IN, LONG, OUT, TOKENS, Cache

# -- the host tier --------------------------------------------------------------------------------


def in_host_tier(num_host_blocks: int = 16, load_policy: str = "load") -> Cache:
    """Make a cache in whose host tier alone TOKENS are."""
    cache = Cache(8, num_host_blocks, load_policy=load_policy)
    cache.free(cache.compute(TOKENS))
    for first_token in range(200, 300, 20):
        cache.visit(first_token)
        cache.save()
    return cache


def test_the_oldest_are_saved_while_free_blocks_are_short() -> None:
    """With a quarter of the device tier free there is time; ends are saved before beginnings."""
    cache = Cache(8, 16)
    cache.free(cache.compute(TOKENS))
    cache.visit(200)
    assert (cache.manager.pool.num_free, cache.copies()) == (3, ())
    cache.visit(300)
    jobs = cache.copies()
    assert {(job.direction, job.checksums) for job in jobs} == {(OUT, None)}
    sources = [source for job in jobs for source, _ in job.pairs]
    assert sources[:3] == [2, 1, 0]
    device, host = cache.manager.tier_loads()
    assert device.num_blocks_copying == host.num_blocks_copying == len(sources)
    for job in jobs:
        cache.end(job)
    assert len(sources) + cache.save() == 7
    device, host = cache.manager.tier_loads()
    assert (device.num_blocks_cached, host.num_blocks_cached) == (7, 7)
    assert cache.copies() == (), "nothing is saved twice"


def test_a_full_block_in_use_is_saved_while_free_blocks_are_short() -> None:
    """At its sequence's end there may be no time left; with free blocks enough there is."""
    for num_blocks, num_saved in ((4, 3), (32, 0)):
        cache = Cache(num_blocks, 16)
        table = cache.compute(TOKENS)
        assert cache.save() == num_saved
        cache.free(table)
        assert cache.save() == 0


def test_what_is_wanted_early_leaves_running_sequences_their_room() -> None:
    """It is in use no more when its turn comes: saving must not hold what they grow into."""
    for num_spare in (0, 2, 8):
        cache = Cache(8, 16)
        cache.free(cache.compute(TOKENS))
        cache.free(cache.compute([*TOKENS[:12], *range(300, 313)]))  # wanted: free ones are short
        assert cache.manager.pool.num_available == 8
        cache.manager.plan_stores(8 - num_spare)
        num_stored = sum(len(job.pairs) for job in cache.manager.take_copies())
        assert num_stored == min(num_spare, 3), "three of the six were computed while short"
        cache.check()


def test_blocks_that_are_to_be_computed_anew_are_not_saved() -> None:
    """A victim that recomputes leaves its blocks to whoever hits them in time."""
    for is_saved_later, num_blocks in ((False, 0), (True, 4)):
        cache = Cache(4, 16)
        cache.free(cache.compute(LONG), is_saved_later=is_saved_later)
        assert cache.save() == num_blocks
        assert cache.start(TOKENS)[1] == 12


def test_a_hit_in_the_host_tier_is_loaded_into_new_blocks() -> None:
    """The table waits for the copy, and nobody else can take the blocks."""
    cache = in_host_tier()
    table, found = cache.start(TOKENS)
    assert found == 12
    (job,) = cache.copies()
    assert job.direction is IN
    assert [target for _, target in job.pairs] == table.blocks[:3]
    assert table.pending_copies == {job.copy_id}
    cache.end(job)
    assert not table.pending_copies
    assert not table.is_broken


def test_whoever_finds_a_block_on_its_way_waits_for_the_same_copy() -> None:
    """One copy, two tables."""
    cache = in_host_tier()
    first, _ = cache.start(TOKENS)
    second, found = cache.start([*TOKENS[:9], 1])
    (job,) = cache.copies()
    assert found == 8
    assert second.blocks[:2] == first.blocks[:2]
    assert second.pending_copies == first.pending_copies == {job.copy_id}
    cache.end(job)
    assert not second.pending_copies


def test_a_failed_pair_breaks_those_who_wait_and_is_found_no_more() -> None:
    """What came before it is a hit for the next attempt."""
    cache = in_host_tier()
    table, _ = cache.start(TOKENS)
    (job,) = cache.copies()
    cache.end(job, 1)
    assert (table.is_broken, table.pending_copies) == (True, set())
    cache.free(table)
    again, found = cache.start(TOKENS)
    assert (found, again.is_broken, cache.copies()) == (4, False, ())
    assert cache.manager.copy_counts().num_failed_blocks == 1


def test_predicted_and_actual_seconds_are_of_the_same_loads() -> None:
    """What failed took no time that says anything, so its prediction does not count either."""
    for failed, num_loads in (((1,), 0), ((), 1)):
        cache = in_host_tier()
        cache.start(TOKENS)
        (job,) = cache.copies()
        expected_s = cache.costs.load_s(3 * BLOCK_BYTES)
        assert expected_s > 0.0, "as stores went"
        cache.end(job, *failed)
        decisions = cache.manager.decisions()
        assert decisions.actual_load_s == num_loads * 1e-3
        assert decisions.predicted_load_s == num_loads * expected_s


def test_a_table_that_is_freed_leaves_its_load_to_end_alone() -> None:
    """The blocks are the copy's until then, and cached afterwards."""
    cache = in_host_tier()
    table, _ = cache.start(TOKENS)
    (job,) = cache.copies()
    cache.free(table)
    device, _ = cache.manager.tier_loads()
    assert (device.num_blocks_used, device.num_blocks_copying) == (0, 3)
    cache.end(job)
    assert cache.start(TOKENS)[1] == 12
    assert cache.copies() == ()


def test_checksums_travel_with_their_blocks() -> None:
    """What came back from a save goes along with the load of the same block."""
    cache = Cache(4, 16)
    cache.free(cache.compute(LONG))
    (job,) = cache.copies()
    sums = {target: 1000 + target for _, target in job.pairs}
    cache.end(job, checksums=tuple(sums.values()))
    cache.free(cache.compute(range(16)))
    for job in cache.copies():
        cache.end(job, checksums=tuple(7 for _ in job.pairs))
    cache.start(TOKENS)
    (load,) = (job for job in cache.copies() if job.direction is IN)
    assert load.checksums == tuple(sums[source] for source, _ in load.pairs)
    cache.end(load, 0, 1, 2)
    assert cache.manager.copy_counts().num_refused_blocks == 3


def test_a_flush_forgets_what_nobody_uses_in_both_tiers() -> None:
    """Used blocks stay shared."""
    cache = in_host_tier()
    table = cache.compute(range(400, 409))
    device, host = cache.manager.tier_loads()
    assert host.num_blocks_cached > 0
    assert cache.manager.flush() == (device.num_blocks_cached, host.num_blocks_cached)
    cache.check()
    device, host = cache.manager.tier_loads()
    assert device.num_blocks_cached == host.num_blocks_cached == 0
    assert cache.start(TOKENS)[1] == 0
    assert cache.start([*range(400, 408), 1])[1] == 8
    cache.free(table)


def test_a_block_that_is_flushed_on_its_way_out_is_not_found() -> None:
    """Nor is its host twin."""
    cache = Cache(4, 16)
    cache.free(cache.compute(LONG))
    (job,) = cache.copies()
    cache.manager.flush()
    cache.end(job)
    device, host = cache.manager.tier_loads()
    assert (device.num_blocks_free, host.num_blocks_free) == (4, 16)
    assert cache.start(TOKENS)[1] == 0


def test_a_host_tier_that_is_not_wanted_stays_empty() -> None:
    """The policy `recompute` neither saves nor loads."""
    cache = in_host_tier(load_policy="recompute")
    assert cache.start(TOKENS)[1] == 0
    assert cache.manager.tier_loads()[1].num_blocks_free == 16


@pytest.mark.parametrize(("num_slow_copies", "num_hit"), [(0, 12), (20, 0)])
def test_auto_loads_what_is_faster_than_computing(num_slow_copies: int, num_hit: int) -> None:
    """Fitted costs decide; twenty throttled copies change the decision. Both ways are counted."""
    cache = in_host_tier(load_policy="auto")
    for _ in range(50):
        cache.costs.copy_done(IN, BLOCK_BYTES, 1e-4)
        cache.costs.step_done(StepWork(8, 36, 0, 0), 0.01)
    for _ in range(num_slow_copies):
        cache.costs.copy_done(IN, BLOCK_BYTES, 1e-1)
    assert cache.start(TOKENS)[1] == num_hit
    decisions = cache.manager.decisions()
    assert decisions.num_loaded_tokens == num_hit
    assert decisions.num_recomputed_tokens == 12 - num_hit
    assert (decisions.num_loads, decisions.num_recomputes) == ((1, 0) if num_hit else (0, 1))
