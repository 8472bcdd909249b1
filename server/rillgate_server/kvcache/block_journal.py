"""Which hashes came into the cache and which went, since somebody was last told.

Owns the net change: what came and went in between is not told. Does not know blocks, nor who
watches.
"""

from rillgate_server.core.block_events import BlockDelta, CacheTier, TierHashes


class BlockJournal:
    """Gathers changes of the prefix index.

    State: per tier the hashes whose place has changed, in order, and which way.
    """

    __slots__ = ("_changes",)

    def __init__(self) -> None:
        """Start with nothing changed."""
        # by CacheTier: hash -> whether it came; a hash comes and goes by turns
        self._changes: tuple[dict[bytes, bool], dict[bytes, bool]] = ({}, {})

    def __repr__(self) -> str:
        device, host = map(len, self._changes)
        return f"BlockJournal(device={device}, host={host})"

    def note(self, tier: CacheTier, block_hash: bytes, *, is_stored: bool) -> None:
        """Note that a hash came, or went; one after the other is no change."""
        changes = self._changes[tier]
        if changes.pop(block_hash, None) is None:
            changes[block_hash] = is_stored

    def take(self) -> BlockDelta | None:
        """Return the changes, and start anew; None: there are none."""
        if not any(self._changes):
            return None
        delta = BlockDelta(stored=self._which(True), evicted=self._which(False))
        self._changes = ({}, {})
        return delta

    def _which(self, is_stored: bool) -> TierHashes:
        device, host = (
            tuple(block_hash for block_hash, came in changes.items() if came is is_stored)
            for changes in self._changes
        )
        return device, host
