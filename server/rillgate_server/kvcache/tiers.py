"""Both tiers of the cache: what is where, who may evict what, what the host tier has yet to get.

Owns the two pools and the one index over them. Does not know sequences, costs or copies' progress:
kvcache.manager decides, kvcache.copy_traffic keeps the copies.

A block's life, and who moves it:

    device   FREE ─▶ USED ─▶ CACHED, unsaved ─▶ COPYING ─▶ CACHED, saved ─▶ FREE (evicted)
                      ▲  ▲        │ acquired       │ the host twin is there: nothing is lost
                      │  └────────┘                ▼
    host              │                       COPYING ─▶ CACHED ─▶ FREE (evicted: least recently
                      └── COPYING (promotion) ◀────────────┘              stored or loaded first)
"""

from collections.abc import Iterable, Sequence
from itertools import islice

from rillgate_server.core.block_events import CacheTier
from rillgate_server.kvcache.block_pool import BlockPool
from rillgate_server.kvcache.prefix_index import PrefixIndex


class Tiers:
    """The blocks of both tiers.

    State: the pools, the index, the unsaved blocks and how often each hash was used again.
    """

    def __init__(self, num_device_blocks: int, num_host_blocks: int, *, saves_blocks: bool) -> None:
        """Start empty. `saves_blocks`: unused device blocks are to go to the host tier in time."""
        self.index = PrefixIndex()
        self.device = BlockPool(
            num_device_blocks,
            lambda block: self.index.has_children(CacheTier.DEVICE, block),
            self._device_evicted,
        )
        self.host = BlockPool(
            num_host_blocks,
            lambda block: self.index.has_children(CacheTier.HOST, block),
            lambda block: self._removed(self.index.remove(CacheTier.HOST, block)),
        )
        self.num_unsaved_evictions = 0
        self.has_host = saves_blocks and num_host_blocks > 0
        """Whether there is a host tier to save blocks in."""
        # CACHED device blocks to be saved, oldest first. A block is put here once per release: one
        # whose host twin is evicted later is not saved again, or a small host tier would be
        # rewritten for ever.
        self._unsaved: dict[int, None] = {}
        self._num_reuses: dict[bytes, int] = {}  # indexed hash -> hits since it was computed

    def __repr__(self) -> str:
        return f"Tiers({self.device}, {self.host}, {self.index}, unsaved={len(self._unsaved)})"

    @property
    def num_unsaved(self) -> int:
        """Cached device blocks that the host tier has yet to get."""
        return len(self._unsaved)

    # -- the device tier's blocks -----------------------------------------------------------------

    def acquire(self, blocks: Sequence[int]) -> None:
        """Use device blocks that were found in the index."""
        for block in blocks:
            self._unsaved.pop(block, None)
        self.device.acquire(blocks)

    def release(self, blocks: Sequence[int], *, is_saved_later: bool) -> None:
        """Give device blocks back, last of the sequence first; indexed ones are kept.

        `is_saved_later`: those that nobody uses any more should go to the host tier in time.
        """
        hash_of = self.index.hash_of
        self.device.release(
            blocks, [hash_of(CacheTier.DEVICE, block) is not None for block in blocks]
        )
        if self.has_host and is_saved_later:
            for block in blocks:
                if self.device.is_cached(block) and not self.is_saved(block):
                    self._unsaved[block] = None

    def is_saved(self, block: int) -> bool:
        """Tell whether an indexed device block has a twin in the host tier."""
        block_hash = self.index.hash_of(CacheTier.DEVICE, block)
        assert block_hash is not None
        return self.index.find(CacheTier.HOST, block_hash) is not None

    def can_store(self, block: int) -> bool:
        """Tell whether an indexed device block may be saved now: no copy has it, nor a twin."""
        return self.device.num_holds(block) == 0 and not self.is_saved(block)

    def oldest_unsaved(self, num_skipped: int, num_blocks: int) -> list[int]:
        """Return unsaved blocks, oldest first, behind the `num_skipped` oldest ones."""
        return list(islice(self._unsaved, num_skipped, num_skipped + num_blocks))

    def hold_for_store(self, blocks: Iterable[int]) -> None:
        """Let a copy own device blocks whose contents go to the host tier."""
        for block in blocks:
            self._unsaved.pop(block, None)
            self.device.hold((block,))

    # -- reuse ------------------------------------------------------------------------------------

    def note_reuse(self, block_hash: bytes) -> int:
        """Count a hit; return how many there were since the block was computed."""
        count = self._num_reuses.get(block_hash, 0) + 1
        self._num_reuses[block_hash] = count
        return count

    # -- the index --------------------------------------------------------------------------------

    def forget(self, block_hash: bytes) -> None:
        """Let nobody find a hash, in either tier; unused blocks of it are free."""
        for tier, pool in ((CacheTier.DEVICE, self.device), (CacheTier.HOST, self.host)):
            block = self.index.find(tier, block_hash)
            if block is not None:
                self.remove(tier, block)
                if pool.is_cached(block):
                    pool.drop((block,))

    def remove(self, tier: CacheTier, block: int) -> None:
        """Let nobody find a block; who uses it, or copies it, goes on."""
        if tier is CacheTier.DEVICE:
            self._unsaved.pop(block, None)
        self._removed(self.index.remove(tier, block))

    def unhold(self, tier: CacheTier, block: int, *, is_touched: bool = False) -> None:
        """End a copy's hold; an indexed block is kept, others are free with their last hold."""
        pool = self.device if tier is CacheTier.DEVICE else self.host
        is_kept = self.index.hash_of(tier, block) is not None
        pool.unhold(block, is_kept=is_kept, is_touched=is_touched)

    def flush(self) -> tuple[int, int]:
        """Forget and free every block that nobody uses; return how many (device, host).

        What a copy alone holds is forgotten too, and free with the copy's end.
        """
        num_flushed = []
        for tier, pool in ((CacheTier.DEVICE, self.device), (CacheTier.HOST, self.host)):
            blocks = self.index.blocks(tier)
            unused = [block for block in blocks if pool.num_refs(block) == 0]
            for block in unused:
                self.remove(tier, block)
            pool.drop([block for block in unused if pool.is_cached(block)])
            num_flushed.append(len(unused))
        return num_flushed[0], num_flushed[1]

    def _device_evicted(self, block: int) -> None:
        if block in self._unsaved:
            del self._unsaved[block]
            self.num_unsaved_evictions += 1
        self._removed(self.index.remove(CacheTier.DEVICE, block))

    def _removed(self, block_hash: bytes) -> None:
        """Forget the reuses of what neither tier has any more."""
        if not self.index.knows(block_hash):
            self._num_reuses.pop(block_hash, None)

    def check_integrity(self) -> None:
        """Prove the pools, the index, and that exactly the findable idle blocks are kept."""
        self.device.check_integrity()
        self.host.check_integrity()
        self.index.check_integrity()
        for tier, pool in ((CacheTier.DEVICE, self.device), (CacheTier.HOST, self.host)):
            for block in pool.cached_blocks():
                assert self.index.hash_of(tier, block) is not None, (
                    f"{tier.name} block {block} is cached, but nobody can find it"
                )
            for block in self.index.blocks(tier):
                is_alive = pool.is_cached(block) or pool.num_refs(block) or pool.num_holds(block)
                assert is_alive, f"{tier.name} block {block} is free and in the index"
        for block in self._unsaved:
            assert self.device.is_cached(block), f"block {block} is unsaved and not cached"
        for block_hash in self._num_reuses:
            assert self.index.knows(block_hash), "reuses of a hash that nobody has"
