"""What has changed since somebody was last told; scheduler traces check the same at random."""

import random

from rillgate_server.core.block_events import BlockDelta, CacheTier
from rillgate_server.kvcache.block_journal import BlockJournal
from rillgate_server.kvcache.prefix_index import PrefixIndex
from tests.support.block_index import KnownBlocks

DEVICE, HOST = CacheTier.DEVICE, CacheTier.HOST
A, B = b"a" * 16, b"b" * 16


def test_changes_are_told_once_by_tier() -> None:
    """The host tier's are not the device tier's, and the next call has nothing."""
    journal = BlockJournal()
    journal.note(DEVICE, A, is_stored=True)
    journal.note(HOST, A, is_stored=False)
    journal.note(DEVICE, B, is_stored=True)
    assert journal.take() == BlockDelta(stored=((A, B), ()), evicted=((), (A,)))
    assert journal.take() is None


def test_what_came_and_went_is_not_told() -> None:
    """Nor what went and came back, as in a block that another sequence offers again."""
    journal = BlockJournal()
    for is_stored in (True, False, True, False):
        journal.note(DEVICE, A, is_stored=is_stored)
    assert journal.take() is None
    for is_stored in (False, True, False):
        journal.note(HOST, B, is_stored=is_stored)
    assert journal.take() == BlockDelta(evicted=((), (B,)))


def test_an_index_that_is_watched_is_known_after_every_change() -> None:
    """Added and removed at random in both tiers; the last removal clears."""
    draw, index, known = random.Random(1), PrefixIndex(), KnownBlocks()
    index.watch(is_on=True)
    where: dict[tuple[CacheTier, bytes], int] = {}
    for block in range(3000):
        tier, block_hash = draw.choice((DEVICE, HOST)), bytes([draw.randint(0, 3)]) * 16
        if (tier, block_hash) in where:
            index.remove(tier, where.pop((tier, block_hash)))
        else:
            where[tier, block_hash] = block
            assert index.add(tier, block_hash, block, None)
        if draw.random() < 0.3:
            delta = index.take_changes()
            if delta is not None:
                known.take_delta(delta)
            assert known.equals(index.hashes())


def test_nothing_is_gathered_while_nobody_watches() -> None:
    """And what was not fetched when the last one left is forgotten."""
    index = PrefixIndex()
    index.add(DEVICE, A, 1, None)
    assert index.take_changes() is None
    index.watch(is_on=True)
    index.add(DEVICE, B, 2, A)
    index.watch(is_on=False)
    assert index.take_changes() is None
    assert index.hashes() == ((A, B), ())
    index.watch(is_on=True)
    index.remove(DEVICE, 2)
    index.remove(DEVICE, 1)
    assert index.take_changes() == BlockDelta(is_cleared=True)
