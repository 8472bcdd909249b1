"""Which blocks a sequence holds, and which of its tokens others have computed already.

Owns the pool, the prefix index and the rules between them. Does not know requests, queues, slots
or tensors: a sequence is its token ids and a BlockTable.

A sequence's tokens, in blocks of 4 (contracts, section 4):

    tokens   a b c d | e f g h | i j k l | m n
    blocks      7    |    2    |    9    |  4
    hashes      h0   |    h1   |    h2   |           chain over the full blocks, made when needed
             ◀── committed ───▶                      computed, and offered in the index
             ◀───── computed ────────▶               the scheduler's num_computed
"""

from collections.abc import Iterable, Sequence
from itertools import islice

from rillgate_server.core.block_hash import block_hash
from rillgate_server.kvcache.block_pool import BlockPool
from rillgate_server.kvcache.prefix_index import PrefixIndex


class BlockTable:
    """The blocks of one sequence; only the KVCacheManager changes it."""

    __slots__ = ("blocks", "hashes", "num_committed", "salt")

    def __init__(self, salt: bytes) -> None:
        """Start without blocks. `salt`: 16 bytes, mixed into the hashes."""
        self.salt = salt
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []
        """Of the sequence's full blocks, as far as anybody asked; survives a preemption."""
        self.num_committed = 0
        """Blocks at the beginning that are computed and offered to others."""

    def __repr__(self) -> str:
        return f"BlockTable(blocks={len(self.blocks)}, committed={self.num_committed})"


class KVCacheManager:
    """The cache's bookkeeping for one model.

    State: the pool, the index, and counters since the start.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size_tokens: int,
        root_hash: bytes,
        *,
        prefix_caching: bool = True,
    ) -> None:
        """Start with an empty cache; `root_hash` names everything that sharers must share."""
        self.block_size_tokens = block_size_tokens
        self.pool = BlockPool(num_blocks)
        self.num_evicted_blocks = 0
        self._index = PrefixIndex()
        self._root_hash = root_hash
        self._prefix_caching = prefix_caching

    def __repr__(self) -> str:
        return f"KVCacheManager({self.pool}, {self._index}, evicted={self.num_evicted_blocks})"

    def num_blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks so many tokens need."""
        return -(-num_tokens // self.block_size_tokens)

    def try_start(
        self,
        table: BlockTable,
        token_ids: Sequence[int],
        *,
        takes_hits: bool = True,
        headroom_blocks: int = 0,
    ) -> int | None:
        """Give an empty table the blocks of all its tokens; return the tokens found in the cache.

        Returns None, and changes nothing, unless `headroom_blocks` would remain available. The
        last token is never a hit: somebody needs its logits.
        """
        assert not table.blocks
        hits: list[int] = []
        if takes_hits and self._prefix_caching:
            num_full = (len(token_ids) - 1) // self.block_size_tokens
            self._extend_hashes(table, token_ids, num_full)
            hits = self._index.longest_prefix(islice(table.hashes, num_full))
        num_new = self.num_blocks_for(len(token_ids)) - len(hits)
        num_taken_from_cached = sum(map(self.pool.is_cached, hits))
        if num_new + num_taken_from_cached + headroom_blocks > self.pool.num_available:
            return None
        self.pool.acquire(hits)  # before the allocation, which could evict them
        table.blocks = hits + self._allocate(num_new)
        table.num_committed = len(hits)
        return len(hits) * self.block_size_tokens

    def try_grow(self, table: BlockTable, num_tokens: int) -> tuple[int, ...] | None:
        """Make the table cover `num_tokens`; return the new blocks, or None: too few left."""
        num_new = self.num_blocks_for(num_tokens) - len(table.blocks)
        if num_new <= 0:
            return ()
        if num_new > self.pool.num_available:
            return None
        new_blocks = self._allocate(num_new)
        table.blocks += new_blocks
        return tuple(new_blocks)

    def commit(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Offer to others the blocks that are full now that `num_computed` tokens are computed."""
        num_full = num_computed // self.block_size_tokens
        if not self._prefix_caching or num_full <= table.num_committed:
            return
        self._extend_hashes(table, token_ids, num_full)
        for i in range(table.num_committed, num_full):
            self._index.add(table.hashes[i], table.blocks[i])
        table.num_committed = num_full

    def free(self, table: BlockTable) -> None:
        """Give all blocks back; those in the index stay until their room is needed."""
        blocks = table.blocks[::-1]
        self.pool.release(blocks, map(self._index.__contains__, blocks))
        table.blocks = []
        table.num_committed = 0

    def forget(self, table: BlockTable) -> None:
        """Offer a table's blocks to nobody from now on; those who hold them keep them."""
        self._index.remove([block for block in table.blocks if block in self._index])

    def clear_cached(self) -> int:
        """Forget all blocks that nobody uses; return how many."""
        dropped = self.pool.drop_cached()
        self._index.remove(dropped)
        return len(dropped)

    def _allocate(self, num_blocks: int) -> list[int]:
        blocks, evicted = self.pool.allocate(num_blocks)
        self._index.remove(evicted)
        self.num_evicted_blocks += len(evicted)
        return blocks

    def _extend_hashes(self, table: BlockTable, token_ids: Sequence[int], num_blocks: int) -> None:
        """Continue the chain up to `num_blocks` full blocks."""
        size = self.block_size_tokens
        hashes = table.hashes
        parent = hashes[-1] if hashes else self._root_hash
        for i in range(len(hashes), num_blocks):
            parent = block_hash(parent, table.salt, token_ids[i * size : (i + 1) * size])
            hashes.append(parent)

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Prove that references are exactly what `tables`, all there are, hold."""
        self.pool.check_integrity()
        self._index.check_integrity()
        num_refs: dict[int, int] = {}
        for table in tables:
            assert table.num_committed <= len(table.blocks)
            assert len(set(table.blocks)) == len(table.blocks), "a block is twice in a table"
            for block in table.blocks:
                num_refs[block] = num_refs.get(block, 0) + 1
        for block in range(self.pool.num_blocks):
            held, counted = num_refs.get(block, 0), self.pool.num_refs(block)
            assert held == counted, (
                f"block {block} is in {held} tables and has {counted} references"
            )
            if self.pool.is_cached(block):
                assert block in self._index, f"block {block} is cached, but nobody can find it"
            elif held == 0:
                assert block not in self._index, f"block {block} is free and in the index"
