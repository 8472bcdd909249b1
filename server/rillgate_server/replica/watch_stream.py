"""One gateway's Watch: the block events that wait to be sent, numbered and cut to size.

Owns the stream's books. The I/O thread alone touches it. Does not know gRPC, the engine, or loads.

    BlockSnapshot (its own), then BlockDelta per step ──add──▶ pending ──take──▶ one message each
"""

import asyncio
from collections import deque

from rillgate_server.core.block_events import (
    MAX_EVENT_HASHES,
    BlockChange,
    BlockDelta,
    BlockEvent,
    BlockSnapshot,
    CacheTier,
    TierHashes,
)

MAX_PENDING_HASHES = 131_072
"""Of changes that a stalled reader has not taken: 2 MiB, and more than a prefill of a million
tokens. Past it the Watch ends; what the reader then gets is a new snapshot."""


class WatchStream:
    """The books of one Watch.

    State: what waits to be sent, its hashes without the snapshot's, and the latest sequence.
    """

    def __init__(self, watch_id: int, max_pending_hashes: int = MAX_PENDING_HASHES) -> None:
        """Start with nothing to send."""
        self.watch_id = watch_id
        self._max_pending_hashes = max_pending_hashes
        self._pending: deque[BlockEvent] = deque()
        self._num_pending_hashes = 0
        self._sequence = 0
        self._wake = asyncio.Event()
        self.is_overflowed = False
        """Whether the reader was too slow: what it would get next has a gap."""

    def __repr__(self) -> str:
        return f"WatchStream(id={self.watch_id}, pending={len(self._pending)})"

    def add_snapshot(self, snapshot: BlockSnapshot) -> None:
        """Send what the cache held when this Watch began; once, before any delta."""
        chunks = list(_chunks(snapshot.hashes)) or [(CacheTier.DEVICE, ())]
        for position, (tier, hashes) in enumerate(chunks):
            is_last = position == len(chunks) - 1
            self._append(BlockChange.SNAPSHOT, tier, hashes, is_last=is_last)
        self._wake.set()

    def add_delta(self, delta: BlockDelta) -> None:
        """Send what has changed since; a delta from before the snapshot is in that already."""
        if self._sequence == 0 or self.is_overflowed:
            return
        if delta.is_cleared:
            self._append(BlockChange.CLEARED)
        # What went, first: so the watcher never holds more than the cache does.
        for change, by_tier in (
            (BlockChange.EVICTED, delta.evicted),
            (BlockChange.STORED, delta.stored),
        ):
            for tier, hashes in _chunks(by_tier):
                self._append(change, tier, hashes)
                self._num_pending_hashes += len(hashes)
        if self._num_pending_hashes > self._max_pending_hashes:
            self.is_overflowed = True
            self._pending.clear()
        self._wake.set()

    def wake(self) -> None:
        """Let `take` return."""
        self._wake.set()

    async def take(self, timeout_s: float) -> BlockEvent | None:
        """Return the next event to send; None: there was none in time, or it was woken."""
        if not self._pending:
            self._wake.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()
            except TimeoutError:
                return None
        if not self._pending:
            return None
        event = self._pending.popleft()
        if event.change is not BlockChange.SNAPSHOT:
            self._num_pending_hashes -= len(event.hashes)
        return event

    def _append(
        self,
        change: BlockChange,
        tier: CacheTier = CacheTier.DEVICE,
        hashes: tuple[bytes, ...] = (),
        *,
        is_last: bool = True,
    ) -> None:
        self._sequence += 1
        self._pending.append(BlockEvent(self._sequence, change, tier, hashes, is_last))


def _chunks(by_tier: TierHashes) -> list[tuple[CacheTier, tuple[bytes, ...]]]:
    """Cut each tier's hashes into messages."""
    return [
        (tier, by_tier[tier][first : first + MAX_EVENT_HASHES])
        for tier in CacheTier
        for first in range(0, len(by_tier[tier]), MAX_EVENT_HASHES)
    ]
