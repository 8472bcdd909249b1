"""Which block holds which prefix: chained hash -> block.

Owns both directions of the map. Does not know references, tokens or sequences: a block stays here
from the moment it is full and computed until it is evicted.
"""

from collections.abc import Iterable


class PrefixIndex:
    """Full, computed blocks by the hash of everything up to their end.

    State: two maps, each the inverse of the other.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._block_of: dict[bytes, int] = {}  # chained hash -> block
        self._hash_of: dict[int, bytes] = {}  # block -> chained hash

    def __repr__(self) -> str:
        return f"PrefixIndex(blocks={len(self._block_of)})"

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, block: int) -> bool:
        return block in self._hash_of

    def add(self, block_hash: bytes, block: int) -> None:
        """Offer a block to later sequences.

        When another block has the same contents (two sequences computed the same prefix at once),
        that one stays, and this one remains its sequence's own: block tables only ever grow at
        their end, so it cannot be exchanged.
        """
        if block_hash in self._block_of:
            return
        assert block not in self._hash_of, f"block {block} is indexed under another hash"
        self._block_of[block_hash] = block
        self._hash_of[block] = block_hash

    def longest_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest known beginning of a chain."""
        blocks: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def remove(self, blocks: Iterable[int]) -> None:
        """Forget blocks that were evicted."""
        for block in blocks:
            del self._block_of[self._hash_of.pop(block)]

    def check_integrity(self) -> None:
        """Prove that the maps are each other's inverse."""
        assert len(self._block_of) == len(self._hash_of)
        for block_hash, block in self._block_of.items():
            assert self._hash_of[block] == block_hash, f"block {block} has two hashes"
