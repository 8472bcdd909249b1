"""What a router knows of a cache: an index built from what it was told alone."""

from rillgate_server.core.block_events import (
    MAX_EVENT_HASHES,
    BlockChange,
    BlockDelta,
    BlockEvent,
    CacheTier,
    TierHashes,
)


class KnownBlocks:
    """Hashes by tier, from a snapshot and changes; refuses a change that is none."""

    def __init__(self) -> None:
        """Know nothing."""
        self.by_tier: dict[CacheTier, set[bytes]] = {tier: set() for tier in CacheTier}
        self.sequence = 0
        self.is_whole = False
        """Whether the snapshot has come to its end."""

    def take_delta(self, delta: BlockDelta) -> None:
        """Apply a step's changes."""
        if delta.is_cleared:
            self._clear()
        for tier in CacheTier:
            self._evict(tier, delta.evicted[tier])
            self._store(tier, delta.stored[tier])

    def take_event(self, event: BlockEvent) -> None:
        """Apply one message of a Watch."""
        self.sequence += 1
        assert event.sequence == self.sequence, "a message is missing"
        assert len(event.hashes) <= MAX_EVENT_HASHES
        assert self.is_whole == (event.change is not BlockChange.SNAPSHOT)
        match event.change:
            case BlockChange.SNAPSHOT:
                self._store(event.tier, event.hashes)
                self.is_whole = event.is_last
            case BlockChange.STORED:
                self._store(event.tier, event.hashes)
            case BlockChange.EVICTED:
                self._evict(event.tier, event.hashes)
            case BlockChange.CLEARED:
                self._clear()

    def equals(self, hashes: TierHashes) -> bool:
        """Tell whether these are all that is known."""
        return all(self.by_tier[tier] == set(hashes[tier]) for tier in CacheTier)

    def _store(self, tier: CacheTier, hashes: tuple[bytes, ...]) -> None:
        assert self.by_tier[tier].isdisjoint(hashes), "stored, and was there"
        self.by_tier[tier].update(hashes)

    def _evict(self, tier: CacheTier, hashes: tuple[bytes, ...]) -> None:
        assert self.by_tier[tier].issuperset(hashes), "evicted, and was not there"
        self.by_tier[tier].difference_update(hashes)

    def _clear(self) -> None:
        assert any(self.by_tier.values()), "cleared, and there was nothing"
        for hashes in self.by_tier.values():
            hashes.clear()
