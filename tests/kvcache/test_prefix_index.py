"""The map from prefixes to blocks, in both tiers."""

import pytest

from rillgate_server.core.block_events import CacheTier
from rillgate_server.kvcache.prefix_index import PrefixIndex

DEVICE, HOST = CacheTier.DEVICE, CacheTier.HOST
CHAIN = [bytes([i]) for i in range(4)]


def chained(tier: CacheTier, blocks: tuple[int, ...]) -> PrefixIndex:
    """Make an index with CHAIN's beginning in one tier."""
    index = PrefixIndex()
    add_chain(index, tier, blocks)
    return index


def add_chain(index: PrefixIndex, tier: CacheTier, blocks: tuple[int, ...]) -> None:
    """Put CHAIN's beginning into a tier."""
    for i, block in enumerate(blocks):
        assert index.add(tier, CHAIN[i], block, CHAIN[i - 1] if i else None)


def test_the_longest_known_beginning_is_found() -> None:
    """A hole ends the search: what follows it is worth nothing."""
    index = chained(DEVICE, (7, 3, 9, 4))
    assert index.match(CHAIN) == [(7, None), (3, None), (9, None), (4, None)]
    assert index.match([*CHAIN[:2], b"other"]) == [(7, None), (3, None)]
    assert index.remove(DEVICE, 3) == CHAIN[1]
    assert index.match(CHAIN) == [(7, None)]
    assert (index.find(DEVICE, CHAIN[1]), index.hash_of(DEVICE, 3)) == (None, None)
    index.check_integrity()


def test_a_chain_may_lie_in_both_tiers() -> None:
    """Each link where it is; a hole in one tier is bridged by the other."""
    index = chained(DEVICE, (7, 3, 9))
    add_chain(index, HOST, (5, 0, 1, 2))
    index.remove(DEVICE, 3)
    index.remove(HOST, 5)
    assert index.match(CHAIN) == [(7, None), (None, 0), (9, 1), (None, 2)]
    assert (index.num_blocks(DEVICE), index.num_blocks(HOST)) == (2, 3)
    assert sorted(index.blocks(HOST)) == [0, 1, 2]
    index.check_integrity()


def test_one_number_means_two_blocks_in_two_tiers() -> None:
    """Block 1 of the host tier is not block 1 of the device tier."""
    index = chained(DEVICE, (1,))
    assert index.add(HOST, CHAIN[1], 1, CHAIN[0])
    assert (index.hash_of(DEVICE, 1), index.hash_of(HOST, 1)) == (CHAIN[0], CHAIN[1])
    assert index.remove(HOST, 1) == CHAIN[1]
    assert index.find(DEVICE, CHAIN[0]) == 1


def test_a_hash_is_known_until_the_last_tier_has_lost_it() -> None:
    """And with it what it continues."""
    index = chained(DEVICE, (7, 3))
    add_chain(index, HOST, (5, 0))
    index.remove(DEVICE, 3)
    assert index.knows(CHAIN[1])
    assert index.parent_of(CHAIN[1]) == CHAIN[0]
    index.remove(HOST, 0)
    assert not index.knows(CHAIN[1])
    assert index.parent_of(CHAIN[0]) is None
    index.check_integrity()


def test_children_are_counted_per_tier() -> None:
    """A block with a continuation in the other tier alone is a leaf."""
    index = chained(DEVICE, (7, 3))
    add_chain(index, HOST, (5,))
    assert index.add(DEVICE, b"fork", 8, CHAIN[0])
    assert index.has_children(DEVICE, 7)
    assert not index.has_children(DEVICE, 3)
    assert not index.has_children(HOST, 5)
    index.remove(DEVICE, 3)
    assert index.has_children(DEVICE, 7), "the fork is still there"
    index.remove(DEVICE, 8)
    assert not index.has_children(DEVICE, 7)
    index.check_integrity()


def test_the_first_of_two_equal_blocks_stays() -> None:
    """Two sequences that computed the same prefix at once do not fight over the entry."""
    index = PrefixIndex()
    assert index.add(DEVICE, b"h", 1, None)
    assert not index.add(DEVICE, b"h", 2, None)
    assert index.find(DEVICE, b"h") == 1
    assert index.hash_of(DEVICE, 2) is None
    index.check_integrity()


def test_one_block_under_two_hashes_is_a_bug() -> None:
    """A block that still stands for other contents was not forgotten when it was evicted."""
    index = PrefixIndex()
    index.add(DEVICE, b"old", 1, None)
    with pytest.raises(AssertionError, match="another hash"):
        index.add(DEVICE, b"new", 1, None)
