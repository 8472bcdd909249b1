"""How many blocks the cache gets."""

import pytest

from rillgate_server.errors import OutOfMemory
from rillgate_server.replica.cache_size import CacheDemand, choose_num_blocks

HUGE = CacheDemand(max_context_tokens=1 << 20, max_running=4096, block_size_tokens=16)


def test_a_configured_size_is_used_up_to_the_last_whole_block() -> None:
    """1000 bytes hold nine blocks of 110."""
    assert choose_num_blocks(1000, 5000, 110, HUGE) == 9


def test_a_size_that_is_not_free_says_needed_and_free() -> None:
    """More than there is: both numbers are in the message."""
    with pytest.raises(OutOfMemory, match=r"cache\.memory_bytes.*5001 bytes.*5000 bytes"):
        choose_num_blocks(5001, 5000, 110, HUGE)


def test_a_size_below_one_block_says_so() -> None:
    """A cache must hold a block."""
    with pytest.raises(OutOfMemory, match=r"one cache block.*110 bytes.*109 bytes"):
        choose_num_blocks(109, 5000, 110, HUGE)


def test_nothing_configured_takes_half_of_what_is_free() -> None:
    """10,000 free bytes give 50 blocks of 100."""
    assert choose_num_blocks(None, 10_000, 100, HUGE) == 50


def test_nothing_configured_takes_no_more_than_is_useful() -> None:
    """Two choices with a context of 33 tokens hold three blocks each; twice that is 12."""
    demand = CacheDemand(max_context_tokens=33, max_running=2, block_size_tokens=16)
    assert choose_num_blocks(None, 1 << 40, 100, demand) == 12


def test_too_little_free_memory_is_said_at_the_start() -> None:
    """Sixteen blocks of 100 in half of the memory need 3200 bytes."""
    with pytest.raises(OutOfMemory, match=r"3200 bytes.*3100 bytes"):
        choose_num_blocks(None, 3100, 100, HUGE)
