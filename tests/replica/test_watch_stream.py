"""The books of one Watch: numbers, sizes, and an end for a reader that is too slow."""

import asyncio

from rillgate_server.core.block_events import (
    BlockChange,
    BlockDelta,
    BlockEvent,
    BlockSnapshot,
    CacheTier,
)
from rillgate_server.replica.watch_stream import WatchStream
from tests.replica.engine_server import DEADLINE_S
from tests.support.block_index import KnownBlocks


def hashes(first: int, count: int) -> tuple[bytes, ...]:
    """Make hashes that differ."""
    return tuple(number.to_bytes(16, "big") for number in range(first, first + count))


async def take_all(watch: WatchStream) -> list[BlockEvent]:
    """Take what is there."""
    events = []
    while (event := await watch.take(0.0)) is not None:
        events.append(event)
    return events


async def test_a_large_snapshot_comes_in_numbered_chunks_of_both_tiers() -> None:
    """At most 4,096 hashes each, and only the last one says so."""
    watch, known = WatchStream(1), KnownBlocks()
    held = (hashes(0, 9000), hashes(5000, 4097))
    watch.add_snapshot(BlockSnapshot(1, held))
    events = await take_all(watch)
    assert [(event.tier.name, len(event.hashes), event.is_last) for event in events] == [
        ("DEVICE", 4096, False),
        ("DEVICE", 4096, False),
        ("DEVICE", 808, False),
        ("HOST", 4096, False),
        ("HOST", 1, True),
    ]
    for event in events:
        known.take_event(event)
    assert known.is_whole
    assert known.equals(held)


async def test_an_empty_cache_sends_one_empty_chunk() -> None:
    """The reader learns that it knows all there is."""
    watch = WatchStream(1)
    watch.add_snapshot(BlockSnapshot(1, ((), ())))
    expected = BlockEvent(1, BlockChange.SNAPSHOT, CacheTier.DEVICE, (), is_last=True)
    assert await take_all(watch) == [expected]


async def test_changes_before_the_snapshot_are_in_it() -> None:
    """Told again they would be wrong."""
    watch, known = WatchStream(1), KnownBlocks()
    watch.add_delta(BlockDelta(stored=(hashes(0, 3), ())))
    watch.add_snapshot(BlockSnapshot(1, (hashes(0, 3), ())))
    watch.add_delta(BlockDelta(stored=(hashes(3, 1), hashes(0, 1)), evicted=(hashes(0, 1), ())))
    watch.add_delta(BlockDelta(is_cleared=True))
    watch.add_delta(BlockDelta(stored=((), hashes(9, 1))))
    for event in await take_all(watch):
        known.take_event(event)
    assert known.equals(((), hashes(9, 1)))


async def test_a_reader_that_is_too_slow_overflows_for_good() -> None:
    """What waited is dropped, nothing is kept any more, and taking some does not mend the gap."""
    watch = WatchStream(1, max_pending_hashes=10)
    watch.add_snapshot(BlockSnapshot(1, (hashes(0, 100), ())))  # is not counted
    watch.add_delta(BlockDelta(stored=(hashes(100, 10), ())))
    assert len(await take_all(watch)) == 2
    watch.add_delta(BlockDelta(stored=(hashes(200, 10), ())))
    watch.add_delta(BlockDelta(evicted=(hashes(0, 1), ())))
    assert watch.is_overflowed
    watch.add_delta(BlockDelta(evicted=(hashes(1, 1), ())))
    assert await take_all(watch) == []
    assert watch.is_overflowed


async def test_taking_waits_for_an_event_and_can_be_woken() -> None:
    """The service's end does not wait for the next change."""
    watch = WatchStream(1)
    taking = asyncio.create_task(watch.take(DEADLINE_S))
    await asyncio.sleep(0)
    watch.add_snapshot(BlockSnapshot(1, ((), ())))
    assert (await taking) is not None
    taking = asyncio.create_task(watch.take(DEADLINE_S))
    await asyncio.sleep(0)
    watch.wake()
    assert await taking is None
