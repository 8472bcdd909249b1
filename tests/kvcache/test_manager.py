"""Which blocks a sequence gets, shares and leaves behind, in both tiers."""

from collections.abc import Sequence

import pytest

from rillgate_server.core.block_hash import root_hash
from rillgate_server.core.request import NO_SALT
from rillgate_server.core.step import CopyDirection, CopyDone, CopyJob
from rillgate_server.kvcache.block_table import BlockTable
from rillgate_server.kvcache.cost_model import CostModel, StepWork
from rillgate_server.kvcache.manager import KVCacheManager
from rillgate_server.kvcache.tier_plan import CachePolicy

SIZE = 4
BLOCK_BYTES = 1000
ROOT = root_hash("00", "float32", SIZE)
TOKENS = list(range(100, 114))  # 3 full blocks of 4, and 2 tokens
LONG = [*TOKENS, 1, 2]  # 4 full blocks
OTHER_SALT = bytes(15) + b"x"
OUT, IN = CopyDirection.DEVICE_TO_HOST, CopyDirection.HOST_TO_DEVICE


class Cache:
    """A manager with blocks of 4 tokens, and every table that it knows."""

    def __init__(
        self,
        num_blocks: int = 8,
        num_host_blocks: int = 0,
        *,
        prefix_caching: bool = True,
        load_policy: str = "load",
    ) -> None:
        """Start empty."""
        self.costs = CostModel()
        policy = CachePolicy(SIZE, BLOCK_BYTES, ROOT, prefix_caching, load_policy)
        self.manager = KVCacheManager(num_blocks, num_host_blocks, policy, self.costs)
        self.tables: list[BlockTable] = []

    def start(
        self,
        tokens: Sequence[int],
        salt: bytes = NO_SALT,
        num_shared_tokens: int = 0,
        headroom_blocks: int = 0,
    ) -> tuple[BlockTable, int | None]:
        """Start a sequence; return its table and the tokens found, None: there was no room."""
        table = BlockTable(salt, num_shared_tokens)
        found = self.manager.try_start(table, tokens, headroom_blocks=headroom_blocks)
        if found is not None:
            self.tables.append(table)
        self.check()
        return table, None if found is None else found.num_hit_tokens

    def compute(self, tokens: Sequence[int], salt: bytes = NO_SALT) -> BlockTable:
        """Start a sequence and compute all of it."""
        table, found = self.start(tokens, salt)
        assert found is not None
        self.manager.commit(table, tokens, len(tokens))
        return table

    def free(self, table: BlockTable, *, is_saved_later: bool = True) -> None:
        """Let a sequence go."""
        self.manager.free(table, is_saved_later=is_saved_later)
        self.tables.remove(table)
        self.check()

    def visit(self, first_token: int) -> None:
        """Compute a prompt of two full blocks that nobody else has, and let it go."""
        self.free(self.compute(range(first_token, first_token + 9)))

    def copies(self) -> tuple[CopyJob, ...]:
        """Begin to save what should be saved; return the copies that begin now."""
        self.manager.plan_stores(0)
        self.check()
        return self.manager.take_copies()

    def end(self, job: CopyJob, *failed_pairs: int, checksums: tuple[int, ...] = ()) -> None:
        """Report a copy."""
        num_bytes = BLOCK_BYTES * (len(job.pairs) - len(failed_pairs))
        num_refused = len(failed_pairs) if job.checksums else 0
        done = CopyDone(
            job.copy_id, failed_pairs, num_bytes, 1e-3, checksums, num_refused=num_refused
        )
        self.manager.copies_done([done])
        self.check()

    def save(self) -> int:
        """Save all that should be saved; return the number of blocks."""
        num_blocks = 0
        while jobs := self.copies():
            for job in jobs:
                num_blocks += len(job.pairs)
                self.end(job)
        return num_blocks

    def check(self) -> None:
        """Prove the manager's integrity."""
        self.manager.check_integrity(self.tables)


# -- sharing in the device tier -------------------------------------------------------------------


def test_a_running_sequence_shares_its_full_blocks() -> None:
    """A second sequence with the same beginning takes the same blocks, and computes the rest."""
    cache = Cache()
    first = cache.compute(TOKENS)
    second, found = cache.start([*TOKENS[:9], 1, 2, 3])
    assert found == 8
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] not in first.blocks


@pytest.mark.parametrize(("num_tokens", "num_hit"), [(1, 0), (4, 0), (5, 4), (12, 8), (13, 12)])
def test_a_hit_never_covers_the_last_token(num_tokens: int, num_hit: int) -> None:
    """Its logits are needed, so at a block's border the last block is computed again."""
    cache = Cache()
    cache.compute(TOKENS)
    assert cache.start(TOKENS[:num_tokens])[1] == num_hit


def test_blocks_outlive_their_sequence_until_room_is_needed() -> None:
    """A freed sequence is a prefix hit for the next one, and its tail goes first."""
    cache = Cache(num_blocks=4)
    cache.free(cache.compute(TOKENS))
    assert (cache.manager.pool.num_cached, cache.manager.pool.num_free) == (3, 1)
    other, found = cache.start(range(200, 208))
    assert found == 0
    assert cache.manager.pool.num_evicted == 1
    cache.free(other)
    assert cache.start(TOKENS)[1] == 8, "the first two blocks were kept"


def test_another_salt_finds_nothing() -> None:
    """Tenants cannot see each other's prefixes."""
    cache = Cache()
    cache.compute(TOKENS)
    assert cache.start(TOKENS, OTHER_SALT)[1] == 0


@pytest.mark.parametrize(("num_shared", "num_hit"), [(0, 0), (3, 0), (4, 4), (11, 8), (14, 12)])
def test_a_declared_prefix_is_found_by_every_salt(num_shared: int, num_hit: int) -> None:
    """As far as its blocks are wholly inside."""
    cache = Cache(num_blocks=16)
    table, _ = cache.start(TOKENS, bytes(15) + b"y", num_shared)
    cache.manager.commit(table, TOKENS, len(TOKENS))
    assert cache.start(TOKENS, OTHER_SALT, num_shared)[1] == num_hit
    assert cache.start(TOKENS, OTHER_SALT)[1] == 0, "it did not declare anything"


def test_only_computed_blocks_are_offered() -> None:
    """A block is shared when it is full and computed, not when it is allocated."""
    cache = Cache(num_blocks=16)
    table, _ = cache.start(TOKENS)
    assert cache.start(TOKENS)[1] == 0
    cache.manager.commit(table, TOKENS, 7)
    assert cache.start(TOKENS)[1] == 4


def test_generated_tokens_are_offered_too() -> None:
    """A continued conversation finds the answer as well as the prompt."""
    cache = Cache()
    table = cache.compute(TOKENS)
    tokens = [*TOKENS, 7, 8]
    assert cache.manager.try_grow(table, 17) is not None
    cache.manager.commit(table, tokens, 16)
    cache.free(table)
    assert cache.start([*tokens, 9])[1] == 16


def test_growing_gives_blocks_only_at_a_border() -> None:
    """Inside a block nothing is allocated; a pool without room says so and changes nothing."""
    cache = Cache(num_blocks=4)
    table = cache.compute(TOKENS[:4])
    assert cache.manager.try_grow(table, 4) == ()
    assert cache.manager.try_grow(table, 5) == (table.blocks[-1],)
    assert cache.manager.try_grow(table, 20) is None
    assert len(table.blocks) == 2
    cache.check()


def test_a_start_without_room_changes_nothing() -> None:
    """The headroom counts, and so do hits that would leave the evictable ones."""
    cache = Cache(num_blocks=4)
    cache.free(cache.compute(TOKENS))  # 3 cached, 1 free
    assert cache.start(TOKENS, headroom_blocks=1)[1] is None
    table, found = cache.start(range(20))
    assert (table.blocks, found) == ([], None)
    assert cache.start(TOKENS)[1] == 12


def test_two_sequences_may_compute_the_same_prefix_at_once() -> None:
    """The second copy is its own and is free afterwards, not cached twice."""
    cache = Cache()
    tables = [cache.start(TOKENS)[0], cache.start(TOKENS)[0]]
    for table in tables:
        cache.manager.commit(table, TOKENS, 14)
    for table in tables:
        cache.free(table)
    assert (cache.manager.pool.num_cached, cache.manager.pool.num_free) == (3, 5)


def test_the_second_copy_takes_the_place_of_a_first_that_is_gone() -> None:
    """Else a chain whose beginning was evicted under it could be found by nobody."""
    cache = Cache(num_blocks=8)
    first, second = cache.start(TOKENS)[0], cache.start(TOKENS)[0]
    for table in (first, second):
        cache.manager.commit(table, TOKENS, 14)
    cache.free(first)
    third, _ = cache.start(range(16))  # evicts the first one's blocks
    cache.free(second)
    cache.free(third)
    assert cache.start(TOKENS)[1] == 12


def test_without_prefix_caching_nothing_is_kept() -> None:
    """The switch turns hits and retention off, in both tiers."""
    cache = Cache(num_blocks=4, num_host_blocks=8, prefix_caching=False)
    table = cache.compute(TOKENS)
    cache.free(table)
    assert cache.manager.pool.num_cached == 0
    assert cache.start(TOKENS)[1] == 0
    assert cache.save() == 0


def test_a_forgotten_sequence_leaves_nothing_behind() -> None:
    """Its blocks are offered to nobody, not even when it is freed; sharers keep theirs."""
    cache = Cache()
    table = cache.compute(TOKENS)
    sharer, _ = cache.start([*TOKENS[:9], 1])
    cache.manager.forget(table)
    assert cache.start(TOKENS[:9])[1] == 0
    cache.free(table)
    cache.free(sharer)
    assert cache.start(TOKENS)[1] == 0


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
