"""Which blocks a sequence gets, shares and leaves behind."""

from collections.abc import Sequence

import pytest

from rillgate_server.core.block_hash import root_hash
from rillgate_server.core.request import NO_SALT
from rillgate_server.kvcache.manager import BlockTable, KVCacheManager

ROOT = root_hash("00", "float32", 4)
TOKENS = list(range(100, 114))  # 3 full blocks of 4, and 2 tokens


def make(num_blocks: int = 8, *, prefix_caching: bool = True) -> KVCacheManager:
    """Build a manager with blocks of 4 tokens."""
    return KVCacheManager(num_blocks, 4, ROOT, prefix_caching=prefix_caching)


def compute(manager: KVCacheManager, tokens: Sequence[int], salt: bytes = NO_SALT) -> BlockTable:
    """Start a sequence and compute all of it."""
    table = BlockTable(salt)
    assert manager.try_start(table, tokens) is not None
    manager.commit(table, tokens, len(tokens))
    return table


def test_a_running_sequence_shares_its_full_blocks() -> None:
    """A second sequence with the same beginning takes the same blocks, and computes the rest."""
    manager = make()
    first, second = compute(manager, TOKENS), BlockTable(NO_SALT)
    assert manager.try_start(second, [*TOKENS[:9], 1, 2, 3]) == 8
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] not in first.blocks
    manager.check_integrity([first, second])


@pytest.mark.parametrize(("num_tokens", "num_hit"), [(1, 0), (4, 0), (5, 4), (12, 8), (13, 12)])
def test_a_hit_never_covers_the_last_token(num_tokens: int, num_hit: int) -> None:
    """Its logits are needed, so at a block's border the last block is computed again."""
    manager = make()
    compute(manager, TOKENS)
    assert manager.try_start(BlockTable(NO_SALT), TOKENS[:num_tokens]) == num_hit


def test_blocks_outlive_their_sequence_until_room_is_needed() -> None:
    """A freed sequence is a prefix hit for the next one, and its tail goes first."""
    manager = make(num_blocks=4)
    first = compute(manager, TOKENS)
    manager.free(first)
    assert (manager.pool.num_cached, manager.pool.num_free) == (3, 1)
    other = BlockTable(NO_SALT)
    assert manager.try_start(other, range(200, 208)) == 0
    assert manager.num_evicted_blocks == 1
    manager.free(other)
    again = BlockTable(NO_SALT)
    assert manager.try_start(again, TOKENS) == 8, "the first two blocks were kept"
    manager.check_integrity([again])


def test_another_salt_finds_nothing() -> None:
    """Tenants cannot see each other's prefixes."""
    manager = make()
    compute(manager, TOKENS)
    assert manager.try_start(BlockTable(bytes(15) + b"x"), TOKENS) == 0


def test_only_computed_blocks_are_offered() -> None:
    """A block is shared when it is full and computed, not when it is allocated."""
    manager = make()
    table = BlockTable(NO_SALT)
    manager.try_start(table, TOKENS)
    manager.commit(table, TOKENS, 7)
    assert manager.try_start(BlockTable(NO_SALT), TOKENS) == 4


def test_generated_tokens_are_offered_too() -> None:
    """A continued conversation finds the answer as well as the prompt."""
    manager = make()
    table = compute(manager, TOKENS)
    tokens = [*TOKENS, 7, 8]
    assert manager.try_grow(table, 17) is not None
    manager.commit(table, tokens, 16)
    manager.free(table)
    assert manager.try_start(BlockTable(NO_SALT), [*tokens, 9]) == 16


def test_growing_gives_blocks_only_at_a_border() -> None:
    """Inside a block nothing is allocated; a pool without room says so and changes nothing."""
    manager = make(num_blocks=4)
    table = compute(manager, TOKENS[:4])
    assert manager.try_grow(table, 4) == ()
    assert manager.try_grow(table, 5) == (table.blocks[-1],)
    assert manager.try_grow(table, 20) is None
    assert len(table.blocks) == 2
    manager.check_integrity([table])


def test_a_start_without_room_changes_nothing() -> None:
    """The headroom counts, and so do hits that would leave the evictable ones."""
    manager = make(num_blocks=4)
    manager.free(compute(manager, TOKENS))  # 3 cached, 1 free
    table = BlockTable(NO_SALT)
    assert manager.try_start(table, TOKENS, headroom_blocks=1) is None
    assert manager.try_start(table, range(20)) is None
    assert table.blocks == []
    manager.check_integrity([])
    assert manager.try_start(table, TOKENS) == 12


def test_two_sequences_may_compute_the_same_prefix_at_once() -> None:
    """The second copy is its own and is free afterwards, not cached twice."""
    manager = make()
    tables = [BlockTable(NO_SALT), BlockTable(NO_SALT)]
    for table in tables:
        assert manager.try_start(table, TOKENS) == 0
    for table in tables:
        manager.commit(table, TOKENS, 14)
    manager.check_integrity(tables)
    for table in tables:
        manager.free(table)
    assert (manager.pool.num_cached, manager.pool.num_free) == (3, 5)
    manager.check_integrity([])


def test_without_prefix_caching_nothing_is_kept() -> None:
    """The switch turns hits and retention off."""
    manager = make(prefix_caching=False)
    table = compute(manager, TOKENS)
    assert manager.try_start(BlockTable(NO_SALT), TOKENS) == 0
    manager.free(table)
    assert manager.pool.num_cached == 0


def test_clearing_forgets_what_nobody_uses() -> None:
    """Used blocks stay shared."""
    manager = make()
    table = compute(manager, TOKENS)
    manager.free(compute(manager, range(4, 9)))
    assert manager.clear_cached() == 1
    other = BlockTable(NO_SALT)
    assert manager.try_start(other, TOKENS) == 12
    manager.check_integrity([table, other])
