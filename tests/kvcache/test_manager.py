"""The cache manager in the device tier: sharing, growing, evicting."""

import pytest

from tests.support.cache import OTHER_SALT, TOKENS, Cache

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
