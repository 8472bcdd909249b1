"""The block pool against a slow, obvious model of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rillgate_server.kvcache.block_pool import BlockPool


def test_blocks_are_given_once_and_come_back() -> None:
    """free + used + cached == total, at every step of a block's life."""
    pool = BlockPool(4)
    blocks, evicted = pool.allocate(3)
    assert (len(set(blocks)), evicted) == (3, [])
    assert (pool.num_free, pool.num_used, pool.num_cached) == (1, 3, 0)
    pool.release(blocks, [True, False, True])
    assert (pool.num_free, pool.num_used, pool.num_cached) == (2, 0, 2)
    pool.acquire([blocks[0]])
    assert (pool.num_free, pool.num_used, pool.num_cached) == (2, 1, 1)
    pool.check_integrity()


def test_a_shared_block_stays_until_its_last_user_lets_go() -> None:
    """References count users."""
    pool = BlockPool(1)
    (block,), _ = pool.allocate(1)
    pool.acquire([block])
    pool.release([block], [True])
    assert (pool.num_refs(block), pool.num_cached) == (1, 0)
    pool.release([block], [True])
    assert (pool.num_refs(block), pool.num_cached) == (0, 1)


def test_the_block_released_first_is_evicted_first() -> None:
    """A sequence that releases its tail first keeps its beginning longest."""
    pool = BlockPool(3)
    (first, middle, tail), _ = pool.allocate(3)
    pool.release([tail, middle, first], [True, True, True])
    assert [pool.allocate(1) for _ in range(3)] == [
        ([tail], [tail]),
        ([middle], [middle]),
        ([first], [first]),
    ]


def test_free_blocks_are_taken_before_cached_ones() -> None:
    """Nothing is evicted while there is room."""
    pool = BlockPool(2)
    (kept, spare), _ = pool.allocate(2)
    pool.release([kept, spare], [True, False])
    assert pool.allocate(1) == ([spare], [])
    assert pool.allocate(1) == ([kept], [kept])


def test_bookkeeping_faults_are_noticed() -> None:
    """A block released twice, a free block acquired, and too many asked for, are our own bugs."""
    pool = BlockPool(2)
    blocks, _ = pool.allocate(1)
    pool.release(blocks, [False])
    with pytest.raises(AssertionError, match="more often"):
        pool.release(blocks, [False])
    with pytest.raises(KeyError):
        pool.acquire(blocks)
    with pytest.raises(AssertionError):
        pool.allocate(3)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.sampled_from("arsd"), st.integers(0, 11), st.booleans()), max_size=60),
)
def test_the_pool_agrees_with_plain_lists(
    num_blocks: int, moves: list[tuple[str, int, bool]]
) -> None:
    """Any sequence of moves: same counts, same order of eviction as a list kept by hand."""
    pool = BlockPool(num_blocks)
    used: list[int] = []  # one entry per reference
    cached: list[int] = []  # oldest first
    for move, number, is_kept in moves:
        if move == "a" and number <= pool.num_available:
            num_evicted = max(0, number - pool.num_free)
            blocks, evicted = pool.allocate(number)
            assert evicted == cached[:num_evicted]
            del cached[:num_evicted]
            assert not set(blocks) & {*used, *cached}
            used += blocks
        elif move == "r" and used:
            block = used.pop(number % len(used))
            pool.release([block], [is_kept])
            if is_kept and block not in used:
                cached.append(block)
        elif move == "s" and used + cached:
            block = (used + cached)[number % len(used + cached)]
            pool.acquire([block])
            used.append(block)
            cached = [other for other in cached if other != block]
        elif move == "d":
            assert pool.drop_cached() == cached
            cached = []
        pool.check_integrity()
        assert (pool.num_used, pool.num_cached) == (len(set(used)), len(cached))
