"""The map from prefixes to blocks."""

import pytest

from rillgate_server.kvcache.prefix_index import PrefixIndex


def test_the_longest_known_beginning_is_found() -> None:
    """A hole ends the search: what follows it is worth nothing."""
    index = PrefixIndex()
    for i, block in enumerate((7, 3, 9, 4)):
        index.add(bytes([i]), block)
    chain = [bytes([i]) for i in range(4)]
    assert index.longest_prefix(chain) == [7, 3, 9, 4]
    assert index.longest_prefix([*chain[:2], b"other"]) == [7, 3]
    index.remove([3])
    assert index.longest_prefix(chain) == [7]
    assert 3 not in index
    index.check_integrity()


def test_the_first_of_two_equal_blocks_stays() -> None:
    """Two sequences that computed the same prefix at once do not fight over the entry."""
    index = PrefixIndex()
    index.add(b"h", 1)
    index.add(b"h", 2)
    assert index.longest_prefix([b"h"]) == [1]
    assert (1 in index, 2 in index, len(index)) == (True, False, 1)


def test_one_block_under_two_hashes_is_a_bug() -> None:
    """A block that still stands for other contents was not forgotten when it was evicted."""
    index = PrefixIndex()
    index.add(b"old", 1)
    with pytest.raises(AssertionError, match="another hash"):
        index.add(b"new", 1)
