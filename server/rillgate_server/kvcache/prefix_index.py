"""Which blocks hold which prefix, in both tiers: chained hash -> block.

Owns both directions of the map per tier, and which prefix continues which. Does not know
references, tokens or sequences: a block stays here from the moment it is full and computed (or on
its way from the host tier) until it is evicted or forgotten.

    hash            h0 ◀─ h1 ◀─ h2 ◀─ h3        device:  h0 7, h1 2          (h3's parent is h2)
                                                host:    h1 5, h2 0, h3 1
"""

from collections.abc import Iterable

from rillgate_server.core.block_events import BlockDelta, CacheTier, TierHashes
from rillgate_server.kvcache.block_journal import BlockJournal


class _Side:
    """One tier's part of the index."""

    __slots__ = ("block_of", "hash_of", "num_children")

    def __init__(self) -> None:
        self.block_of: dict[bytes, int] = {}  # chained hash -> block
        self.hash_of: dict[int, bytes] = {}  # block -> chained hash
        self.num_children: dict[bytes, int] = {}  # hash -> blocks of this tier that continue it


class PrefixIndex:
    """Full blocks by the hash of everything up to their end.

    State: per tier two maps, each the inverse of the other, and the count of children; each
    indexed hash's parent; and, while somebody watches, what has changed since it was told.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._sides = (_Side(), _Side())  # by CacheTier
        self._parent_of: dict[bytes, bytes | None] = {}  # hash in either tier -> what it continues
        self._journal: BlockJournal | None = None

    def __repr__(self) -> str:
        device, host = (len(side.block_of) for side in self._sides)
        return f"PrefixIndex(device={device}, host={host})"

    def num_blocks(self, tier: CacheTier) -> int:
        """Return how many blocks of a tier can be found."""
        return len(self._sides[tier].block_of)

    def find(self, tier: CacheTier, block_hash: bytes) -> int | None:
        """Return the block with these contents, if the tier has one."""
        return self._sides[tier].block_of.get(block_hash)

    def knows(self, block_hash: bytes) -> bool:
        """Tell whether either tier has a block with these contents."""
        return block_hash in self._parent_of

    def blocks(self, tier: CacheTier) -> list[int]:
        """Return all blocks of a tier that can be found."""
        return list(self._sides[tier].hash_of)

    def hash_of(self, tier: CacheTier, block: int) -> bytes | None:
        """Return under which hash a block is found; None: it is not in the index."""
        return self._sides[tier].hash_of.get(block)

    def parent_of(self, block_hash: bytes) -> bytes | None:
        """Return what an indexed hash continues; None: it begins a sequence."""
        return self._parent_of[block_hash]

    def has_children(self, tier: CacheTier, block: int) -> bool:
        """Tell whether a block of the tier continues this one."""
        side = self._sides[tier]
        return side.hash_of.get(block) in side.num_children

    def match(self, hashes: Iterable[bytes]) -> list[tuple[int | None, int | None]]:
        """Return (device block, host block) along the longest beginning that either tier knows."""
        device, host = (side.block_of for side in self._sides)
        found: list[tuple[int | None, int | None]] = []
        for block_hash in hashes:
            device_block = device.get(block_hash)
            host_block = host.get(block_hash)
            if device_block is None and host_block is None:
                break
            found.append((device_block, host_block))
        return found

    def add(self, tier: CacheTier, block_hash: bytes, block: int, parent: bytes | None) -> bool:
        """Offer a block to later sequences; False when another one has these contents.

        Then that one stays, and this one remains its sequence's own (two sequences computed the
        same prefix at once): block tables only ever grow at their end, so it cannot be exchanged.
        """
        side = self._sides[tier]
        if block_hash in side.block_of:
            return False
        assert block not in side.hash_of, f"block {block} is indexed under another hash"
        side.block_of[block_hash] = block
        side.hash_of[block] = block_hash
        self._parent_of[block_hash] = parent
        if parent is not None:
            side.num_children[parent] = side.num_children.get(parent, 0) + 1
        if self._journal is not None:
            self._journal.note(tier, block_hash, is_stored=True)
        return True

    def remove(self, tier: CacheTier, block: int) -> bytes:
        """Forget a block; return its hash."""
        side = self._sides[tier]
        block_hash = side.hash_of.pop(block)
        del side.block_of[block_hash]
        parent = self._parent_of[block_hash]
        if parent is not None:
            if side.num_children[parent] == 1:
                del side.num_children[parent]
            else:
                side.num_children[parent] -= 1
        if all(block_hash not in other.block_of for other in self._sides):
            del self._parent_of[block_hash]
        if self._journal is not None:
            self._journal.note(tier, block_hash, is_stored=False)
        return block_hash

    # -- who watches ------------------------------------------------------------------------------

    def hashes(self) -> TierHashes:
        """Return all hashes by tier. Costs O(blocks)."""
        device, host = self._sides
        return tuple(device.block_of), tuple(host.block_of)

    def watch(self, *, is_on: bool) -> None:
        """Gather changes from now on, or no more; what was gathered is forgotten."""
        self._journal = BlockJournal() if is_on else None

    def take_changes(self) -> BlockDelta | None:
        """Return what has changed since the last call while watched; None: nothing."""
        if self._journal is None:
            return None
        delta = self._journal.take()
        if delta is not None and not self._parent_of:
            return BlockDelta(is_cleared=True)
        return delta

    def check_integrity(self) -> None:
        """Prove that the maps are each other's inverse, and count the children anew."""
        for side in self._sides:
            assert len(side.block_of) == len(side.hash_of)
            num_children: dict[bytes, int] = {}
            for block_hash, block in side.block_of.items():
                assert side.hash_of[block] == block_hash, f"block {block} has two hashes"
                parent = self._parent_of[block_hash]
                if parent is not None:
                    num_children[parent] = num_children.get(parent, 0) + 1
            assert num_children == side.num_children
        known = {block_hash for side in self._sides for block_hash in side.block_of}
        assert known == self._parent_of.keys()
