"""What a replica says of the blocks in its cache: which hashes came, and which went.

Plain values that cross three floors: the cache manager gathers changes, the replica cuts them into
events and sends them, the gateway's router keeps an index of them. Does not know blocks' numbers or
messages.

    BlockSnapshot, then BlockDelta per step ──▶ BlockEvent, BlockEvent, …      (of one watch)
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

MAX_EVENT_HASHES = 4096
"""Of one event (contracts, section 2): 64 KiB."""


class CacheTier(IntEnum):
    """Where a block lies."""

    DEVICE = 0
    HOST = 1


class BlockChange(IntEnum):
    """What an event's hashes did."""

    SNAPSHOT = 0
    """Were there when the watch began."""
    STORED = 1
    EVICTED = 2
    CLEARED = 3
    """Everything is gone; without hashes."""


TierHashes: TypeAlias = tuple[tuple[bytes, ...], tuple[bytes, ...]]
"""By CacheTier."""


@dataclass(frozen=True, slots=True)
class BlockSnapshot:
    """All that the cache held when a watch began."""

    watch_id: int
    """Whose watch; the deltas that follow are everybody's."""
    hashes: TierHashes


@dataclass(frozen=True, slots=True)
class BlockDelta:
    """What has come and what has gone since the last one."""

    stored: TierHashes = ((), ())
    evicted: TierHashes = ((), ())
    is_cleared: bool = False
    """Nothing is left."""


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """One change of what a replica's cache holds."""

    sequence: int
    """+1 from event to event of one watch, from 1 on: a gap is visible."""
    change: BlockChange
    tier: CacheTier = CacheTier.DEVICE
    hashes: tuple[bytes, ...] = ()
    """Of 16 bytes each, at most MAX_EVENT_HASHES."""
    is_last: bool = True
    """Of a snapshot: nothing of it follows."""
