"""The blocks of one sequence, and the chained hashes of its tokens."""

from collections.abc import Sequence

from rillgate_server.core.block_hash import chained_hashes
from rillgate_server.core.request import NO_SALT


class BlockTable:
    """The blocks of one sequence; only the KVCacheManager changes it.

    A sequence's tokens, in blocks of 4 (contracts, section 4):

        tokens   a b c d | e f g h | i j k l | m n
        blocks      7    |    2    |    9    |  4
        hashes      h0   |    h1   |    h2   |         chain over the full blocks
        salt       none  |   salt  |   salt  |         none inside a shared prefix
                 ◀── committed ───▶                    computed or loaded, and offered
    """

    __slots__ = (
        "blocks",
        "hashes",
        "is_broken",
        "is_private",
        "num_committed",
        "num_hits",
        "num_refused_blocks",
        "num_shared_tokens",
        "pending_copies",
        "salt",
    )

    def __init__(self, salt: bytes = NO_SALT, num_shared_tokens: int = 0) -> None:
        """Start without blocks. `salt`: 16 bytes, for the hashes behind the shared tokens."""
        self.salt = salt
        self.num_shared_tokens = num_shared_tokens
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []
        """Of the sequence's full blocks, as far as anybody asked; survives a preemption."""
        self.num_committed = 0
        """Blocks at the beginning that are offered to others."""
        self.num_hits = 0
        """Blocks at the beginning that were found when it started; what follows is its own."""
        self.pending_copies: set[int] = set()
        """Copies that bring blocks of this table: it is not to be computed before their end."""
        self.is_broken = False
        """Whether one of those copies failed: the table must be freed, and started anew."""
        self.is_private = False
        """Whether its blocks are to be offered to nobody."""
        self.num_refused_blocks = 0
        """Blocks that a start needed when there was no room the last time; 0: there was."""

    def __repr__(self) -> str:
        return (
            f"BlockTable(blocks={len(self.blocks)}, committed={self.num_committed}, "
            f"pending={sorted(self.pending_copies)}, broken={self.is_broken})"
        )

    def extend_hashes(
        self, token_ids: Sequence[int], num_blocks: int, block_size_tokens: int, root_hash: bytes
    ) -> None:
        """Continue the chain up to `num_blocks` full blocks."""
        size, first = block_size_tokens, len(self.hashes)
        if first >= num_blocks:
            return
        num_shared = self.num_shared_tokens // size
        salts = [NO_SALT if i < num_shared else self.salt for i in range(first, num_blocks)]
        parent = self.hashes[-1] if self.hashes else root_hash
        self.hashes += chained_hashes(parent, salts, token_ids[first * size : num_blocks * size])

    def parent_of(self, position: int) -> bytes | None:
        """Return the hash that the one at `position` continues."""
        return self.hashes[position - 1] if position else None
