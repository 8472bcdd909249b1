"""The block pool against a slow, obvious model of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rillgate_server.kvcache.block_pool import BlockPool


class Watched:
    """A pool, and the blocks that it evicted, oldest first."""

    def __init__(self, num_blocks: int, children: dict[int, int] | None = None) -> None:
        """Start with a free pool. `children`: block -> the one that continues it, while that is
        not evicted."""
        self.evicted: list[int] = []
        self._children = children or {}
        self.pool = BlockPool(num_blocks, self._has_child, self.evicted.append)

    def _has_child(self, block: int) -> bool:
        return block in self._children and self._children[block] not in self.evicted

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Return (free, used, cached, copying), after a proof of integrity."""
        pool = self.pool
        pool.check_integrity()
        counts = pool.num_free, pool.num_used, pool.num_cached, pool.num_copying
        assert sum(counts) == pool.num_blocks
        return counts


def test_blocks_are_given_once_and_come_back() -> None:
    """free + used + cached + copying == total, at every step of a block's life."""
    it = Watched(4)
    blocks = it.pool.allocate(3)
    assert len(set(blocks)) == 3
    assert it.counts == (1, 3, 0, 0)
    it.pool.release(blocks, [True, False, True])
    assert it.counts == (2, 0, 2, 0)
    it.pool.acquire([blocks[0]])
    assert it.counts == (2, 1, 1, 0)
    it.pool.drop([blocks[2]])
    assert it.counts == (3, 1, 0, 0)
    assert not it.evicted


def test_a_shared_block_stays_until_its_last_user_lets_go() -> None:
    """References count users."""
    it = Watched(1)
    (block,) = it.pool.allocate(1)
    it.pool.acquire([block])
    it.pool.release([block], [True])
    assert (it.pool.num_refs(block), it.counts) == (1, (0, 1, 0, 0))
    it.pool.release([block], [True])
    assert (it.pool.num_refs(block), it.counts) == (0, (0, 0, 1, 0))


def test_free_blocks_are_taken_before_cached_ones() -> None:
    """Nothing is evicted while there is room."""
    it = Watched(2)
    kept, spare = it.pool.allocate(2)
    it.pool.release([kept, spare], [True, False])
    assert (it.pool.allocate(1), it.evicted) == ([spare], [])
    assert (it.pool.allocate(1), it.evicted) == ([kept], [kept])
    assert it.pool.num_evicted == 1


# -- the order of eviction ------------------------------------------------------------------------


def test_the_block_released_first_is_evicted_first() -> None:
    """A sequence that releases its tail first keeps its beginning longest."""
    it = Watched(3)
    first, middle, tail = it.pool.allocate(3)
    it.pool.release([tail, middle, first], [True, True, True])
    assert [it.pool.allocate(1) for _ in range(3)] == [[tail], [middle], [first]]


def test_a_block_that_was_used_again_is_the_youngest() -> None:
    """Least recently used, not first in."""
    it = Watched(3)
    first, middle, last = it.pool.allocate(3)
    it.pool.release([first, middle, last], [True] * 3)
    it.pool.acquire([first])
    it.pool.release([first], [True])
    it.pool.allocate(3)
    assert it.evicted == [middle, last, first]


def test_leaves_go_before_what_they_continue() -> None:
    """Whatever their age: without its parent a block can never be found."""
    it = Watched(3, children={0: 1, 1: 2})
    blocks = it.pool.allocate(3)
    it.pool.release(sorted(blocks), [True] * 3)  # the beginning was released first
    it.pool.allocate(3)
    assert it.evicted == [2, 1, 0]


def test_a_parent_goes_when_its_leaf_is_in_use() -> None:
    """Room is found, if there is any: the search does not walk in circles."""
    it = Watched(2, children={0: 1})
    it.pool.allocate(2)
    it.pool.release([0], [True])
    assert it.pool.allocate(1) == [0]


def test_the_order_stays_right_over_thousands_of_uses() -> None:
    """Entries that are out of date are swept, and the newest ones are not among them."""
    it = Watched(4)
    blocks = it.pool.allocate(4)
    it.pool.release(blocks, [True] * 4)
    for i in range(1000):
        block = blocks[i * 7 % 3]
        it.pool.acquire([block])
        it.pool.release([block], [True])
    it.pool.allocate(4)
    assert it.evicted[0] == blocks[3]
    assert it.evicted[-1] == blocks[999 * 7 % 3]


# -- copies ---------------------------------------------------------------------------------------


def test_a_cached_block_in_a_copy_cannot_be_evicted() -> None:
    """It is the copy's until the copy has ended, and then as old as before."""
    it = Watched(2)
    old, young = it.pool.allocate(2)
    it.pool.release([old, young], [True, True])
    it.pool.hold([old])
    assert (it.counts, it.pool.num_available) == ((0, 0, 1, 1), 1)
    assert it.pool.allocate(1) == [young]
    it.pool.release([young], [True])
    it.pool.unhold(old, is_kept=True)
    assert it.counts == (0, 0, 2, 0)
    assert it.pool.allocate(1) == [old]


def test_a_touched_block_is_as_young_as_its_copy() -> None:
    """Loading a block from the host tier is a use of it."""
    it = Watched(2)
    loaded, other = it.pool.allocate(2)
    it.pool.release([loaded, other], [True, True])
    it.pool.hold([loaded])
    it.pool.unhold(loaded, is_kept=True, is_touched=True)
    assert it.pool.allocate(1) == [other]


def test_a_used_block_in_a_copy_is_used() -> None:
    """Whoever ends last, user or copy, decides where it goes."""
    it = Watched(1)
    (block,) = it.pool.allocate(1)
    it.pool.hold([block])
    assert it.counts == (0, 1, 0, 0)
    it.pool.release([block], [True])
    assert it.counts == (0, 0, 0, 1)
    it.pool.acquire([block])
    assert it.counts == (0, 1, 0, 0)
    it.pool.unhold(block, is_kept=True)
    assert it.counts == (0, 1, 0, 0)
    it.pool.release([block], [False])
    assert it.counts == (1, 0, 0, 0)


def test_a_block_is_free_only_after_its_last_copy() -> None:
    """A host block may be the source of two loads."""
    it = Watched(1)
    (block,) = it.pool.allocate(1)
    it.pool.hold([block])
    it.pool.hold([block])
    it.pool.release([block], [False])
    it.pool.unhold(block, is_kept=False)
    assert (it.pool.num_holds(block), it.counts) == (1, (0, 0, 0, 1))
    it.pool.unhold(block, is_kept=False)
    assert it.counts == (1, 0, 0, 0)


def test_bookkeeping_faults_are_noticed() -> None:
    """Too much released, a free block used or held, too many asked for: our own bugs."""
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks, [False])
    with pytest.raises(AssertionError, match="more often"):
        pool.release(blocks, [False])
    with pytest.raises(AssertionError, match="in no copy"):
        pool.unhold(blocks[0], is_kept=False)
    for use in (pool.acquire, pool.hold, pool.drop):
        with pytest.raises(KeyError):
            use(blocks)
    with pytest.raises(AssertionError):
        pool.allocate(3)


class PlainPool:
    """What the pool should be, in plain lists."""

    def __init__(self) -> None:
        self.used: list[int] = []  # one entry per reference
        self.held: list[int] = []  # one entry per hold
        self.cached: list[int] = []  # oldest first
        self.ages: list[int] = []  # blocks, by their last release, oldest first

    def touch(self, block: int) -> None:
        """Make a block the youngest."""
        self.ages = [other for other in self.ages if other != block] + [block]

    def put_away(self, block: int, *, is_kept: bool) -> None:
        """Cache a block at its age, if nobody has it and it is kept."""
        if is_kept and block not in self.used + self.held:
            self.cached = sorted([*self.cached, block], key=self.ages.index)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 10),
    st.lists(
        st.tuples(st.sampled_from("aarrsshud"), st.integers(0, 11), st.booleans()), max_size=80
    ),
)
def test_the_pool_agrees_with_plain_lists(
    num_blocks: int, moves: list[tuple[str, int, bool]]
) -> None:
    """Any sequence of moves: same counts, same order of eviction as lists kept by hand."""
    it, plain = Watched(num_blocks), PlainPool()
    pool = it.pool
    for move, number, is_kept in moves:
        in_sight = sorted({*plain.used, *plain.held, *plain.cached})
        if move == "a" and number <= pool.num_available:
            num_evicted = max(0, number - pool.num_free)
            it.evicted.clear()
            blocks = pool.allocate(number)
            assert it.evicted == plain.cached[:num_evicted]
            del plain.cached[:num_evicted]
            assert not set(blocks) & {*plain.used, *plain.held, *plain.cached}
            plain.used += blocks
        elif move == "r" and plain.used:
            block = plain.used.pop(number % len(plain.used))
            pool.release([block], [is_kept])
            if block not in plain.used:
                plain.touch(block)
                plain.put_away(block, is_kept=is_kept)
        elif move in "sh" and in_sight:
            block = in_sight[number % len(in_sight)]
            (pool.acquire if move == "s" else pool.hold)([block])
            (plain.used if move == "s" else plain.held).append(block)
            plain.cached = [other for other in plain.cached if other != block]
        elif move == "u" and plain.held:
            block = plain.held.pop(number % len(plain.held))
            is_touched = number % 2 == 0
            pool.unhold(block, is_kept=is_kept, is_touched=is_touched)
            if is_touched:
                plain.touch(block)
            plain.put_away(block, is_kept=is_kept)
        elif move == "d":
            assert set(pool.cached_blocks()) == set(plain.cached)
            pool.drop(plain.cached)
            plain.cached = []
        num_copying = len(set(plain.held) - set(plain.used))
        assert it.counts[1:] == (len(set(plain.used)), len(plain.cached), num_copying)
