"""Which blocks a sequence holds, which of its tokens others have computed, and in which tier.

Owns the rules: what a sequence starts with, what is loaded and what computed again, what goes to
the host tier and when. Does not know requests, queues, slots or tensors: a sequence is its token
ids and a BlockTable.

    try_start ─▶ hits in the device tier, loads from the host tier, new blocks for the rest
    try_grow, commit ─▶ free: full blocks stay CACHED in the device tier
    plan_stores: the oldest of them are saved in the host tier while free blocks are short

Only full, hashed blocks are shared or live in the host tier, so swapping, resuming and prefix hits
are this one path.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from rillgate_server.core.block_events import CacheTier
from rillgate_server.core.load import CopyCounts, LoadDecisions, TierLoad
from rillgate_server.core.step import CopyDone, CopyJob
from rillgate_server.kvcache.block_pool import BlockPool
from rillgate_server.kvcache.block_table import BlockTable
from rillgate_server.kvcache.copy_traffic import CopyTraffic
from rillgate_server.kvcache.cost_model import CostModel
from rillgate_server.kvcache.prefix_index import PrefixIndex
from rillgate_server.kvcache.tier_plan import CachePolicy, TierPlan
from rillgate_server.kvcache.tiers import Tiers

MAX_STORES = 2
"""Not over at a time: one that runs, one that is ready when the plan after the next is made."""
FREE_FRACTION = 0.25
"""Of the device tier: with fewer free blocks the oldest cached ones are saved. A sooner save would
write what is hit again before it is evicted; a later one loses blocks to a burst of arrivals."""


@dataclass(frozen=True, slots=True)
class StartedTable:
    """What a table found in the cache."""

    num_hit_tokens: int
    """In both tiers; they are there once the table has no pending copies."""
    num_host_tokens: int
    """Those of them that are loaded for it."""


class KVCacheManager:
    """The cache's bookkeeping for one model.

    State: the tiers, the copies, the hashes that are wanted in the host tier, and counters.
    """

    def __init__(
        self, num_device_blocks: int, num_host_blocks: int, policy: CachePolicy, costs: CostModel
    ) -> None:
        """Start with an empty cache."""
        self.block_size_tokens = policy.block_size_tokens
        self._tiers = Tiers(
            num_device_blocks,
            num_host_blocks,
            saves_blocks=policy.uses_host_tier,
        )
        self._copies = CopyTraffic(self._tiers, policy.block_bytes, costs)
        self._policy = policy
        self._plan = TierPlan(policy, costs)
        self._wanted: dict[bytes, None] = {}  # hashes to be saved though they may be in use
        self._num_device_hit_tokens = 0

    def __repr__(self) -> str:
        return f"KVCacheManager({self._tiers}, {self._copies})"

    @property
    def pool(self) -> BlockPool:
        """The device tier's blocks."""
        return self._tiers.device

    @property
    def index(self) -> PrefixIndex:
        """What can be found, and in which tier."""
        return self._tiers.index

    @property
    def has_copies(self) -> bool:
        """Whether a copy is not over."""
        return self._copies.num_copies > 0

    def num_blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks so many tokens need."""
        return -(-num_tokens // self.block_size_tokens)

    # -- a sequence's blocks ----------------------------------------------------------------------

    def try_start(
        self,
        table: BlockTable,
        token_ids: Sequence[int],
        *,
        takes_hits: bool = True,
        headroom_blocks: int = 0,
        num_delayed: float = 0.0,
    ) -> StartedTable | None:
        """Give an empty table the blocks of all its tokens.

        Returns None, and changes nothing, unless `headroom_blocks` would remain available. The
        last token is never a hit: somebody needs its logits. `num_delayed`: as in
        TierPlan.choose_cut.
        """
        assert not table.blocks
        available = self.pool.num_available - headroom_blocks
        if headroom_blocks and table.num_refused_blocks > available:
            return None  # as the last time; others' progress may have made it cheaper: a detail
        known = self._match(table, token_ids) if takes_hits else []
        cut = self._plan.choose_cut(
            [device is not None for device, _ in known],
            len(token_ids),
            self._copies.load_s,
            num_delayed,
        )
        chain = known[:cut]
        hits = [device for device, _ in chain if device is not None]
        num_new = self.num_blocks_for(len(token_ids)) - len(hits)
        num_needed = num_new + sum(map(self.pool.is_cached, hits))
        if num_needed > available:
            table.num_refused_blocks = num_needed
            return None
        self._take_hits(table, chain, num_new)
        self._plan.note_start(
            len(chain) - len(hits), sum(device is None for device, _ in known[cut:])
        )
        return self._note_hits(table, chain, len(hits))

    def count_cached_tokens(self, table: BlockTable, token_ids: Sequence[int]) -> int:
        """Return how many of an empty table's tokens either tier knows now."""
        return len(self._match(table, token_ids)) * self.block_size_tokens

    def _match(
        self, table: BlockTable, token_ids: Sequence[int]
    ) -> list[tuple[int | None, int | None]]:
        """Return (device block, host block) along the longest known beginning."""
        if not self._policy.prefix_caching:
            return []
        num_full = (len(token_ids) - 1) // self.block_size_tokens
        self._extend_hashes(table, token_ids, num_full)
        return self._tiers.index.match(islice(table.hashes, num_full))

    def _take_hits(
        self, table: BlockTable, chain: Sequence[tuple[int | None, int | None]], num_new: int
    ) -> None:
        """Fill the table: hits where they are, new blocks where they are not; begin the loads."""
        hits = [device for device, _ in chain if device is not None]
        self._tiers.acquire(hits)  # before the allocation, which could evict them
        missing = [i for i, (device, _) in enumerate(chain) if device is None]
        arriving = iter(self.pool.allocate(num_new))
        table.blocks = [next(arriving) if device is None else device for device, _ in chain]
        table.blocks += arriving
        table.num_hits = table.num_committed = len(chain)
        table.num_refused_blocks = 0
        self._copies.wait_for(table, hits)
        if missing:
            self._copies.load(table, missing)

    def _note_hits(
        self, table: BlockTable, chain: Sequence[tuple[int | None, int | None]], num_hits: int
    ) -> StartedTable:
        size = self.block_size_tokens
        self._num_device_hit_tokens += num_hits * size
        if self._tiers.has_host:
            threshold = self._plan.reuse_threshold()
            self._want(
                block_hash
                for block_hash, (_, host) in zip(table.hashes, chain, strict=False)
                if host is None and self._tiers.note_reuse(block_hash) >= threshold
            )
        return StartedTable(len(chain) * size, (len(chain) - num_hits) * size)

    def try_grow(
        self, table: BlockTable, num_tokens: int, headroom_blocks: int = 0
    ) -> tuple[int, ...] | None:
        """Make the table cover `num_tokens`; return the new blocks, or None: too few left.

        `headroom_blocks` would remain available.
        """
        num_new = self.num_blocks_for(num_tokens) - len(table.blocks)
        if num_new <= 0:
            return ()
        if num_new > self.pool.num_available - headroom_blocks:
            return None
        new_blocks = self.pool.allocate(num_new)
        table.blocks += new_blocks
        return tuple(new_blocks)

    def commit(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Offer to others the blocks that are full now that `num_computed` tokens are computed."""
        num_full = num_computed // self.block_size_tokens
        if not self._policy.prefix_caching or num_full <= table.num_committed:
            return
        self._extend_hashes(table, token_ids, num_full)
        first, table.num_committed = table.num_committed, num_full
        self._offer(table, first)
        if self._tiers.has_host and self._is_short_of_free_blocks and self._plan.saves_pay:
            # In use until the end of its sequence, when there may be no time left to save it.
            self._want(table.hashes[first:num_full])

    def free(self, table: BlockTable, *, is_saved_later: bool = True) -> None:
        """Give all blocks back; those in the index stay until their room is needed.

        `is_saved_later`: they should go to the host tier in time, if there is one.
        """
        self._copies.stop_waiting(table)
        # What another sequence had computed too may have been evicted since, under our own
        # continuation of it: offered again, the whole chain can be found.
        self._offer(table, table.num_hits)
        if not is_saved_later:
            for block_hash in table.hashes[: table.num_committed]:
                self._wanted.pop(block_hash, None)
        self._tiers.release(table.blocks[::-1], is_saved_later=is_saved_later)
        table.blocks = []
        table.num_committed = 0

    def forget(self, table: BlockTable) -> None:
        """Offer a table's blocks to nobody from now on; those who hold them keep them.

        What another sequence computed itself it may offer again, when it ends.
        """
        table.is_private = True
        index = self._tiers.index
        for position in range(table.num_committed):
            block_hash = table.hashes[position]
            if index.find(CacheTier.DEVICE, block_hash) == table.blocks[position]:
                self._tiers.forget(block_hash)

    def flush(self) -> tuple[int, int]:
        """Forget all blocks that nobody uses; return how many (device, host)."""
        return self._tiers.flush()

    def _offer(self, table: BlockTable, first: int) -> None:
        """Let the table's committed blocks from `first` on be found, where no others are."""
        if table.is_private:
            return
        index = self._tiers.index
        for i in range(first, table.num_committed):
            if index.find(CacheTier.DEVICE, table.hashes[i]) is None:
                index.add(CacheTier.DEVICE, table.hashes[i], table.blocks[i], table.parent_of(i))

    def _extend_hashes(self, table: BlockTable, token_ids: Sequence[int], num_blocks: int) -> None:
        table.extend_hashes(token_ids, num_blocks, self.block_size_tokens, self._policy.root_hash)

    # -- preemption -------------------------------------------------------------------------------

    def restart_s(self, table: BlockTable, num_tokens: int) -> float:
        """Predict what a preempted sequence costs when it comes back."""
        return self._plan.restart_s(table.num_committed, num_tokens, has_host=self._tiers.has_host)

    def choose_swap(self, table: BlockTable, num_tokens: int) -> bool:
        """Decide whether a victim's blocks go to the host tier, or are left to be computed anew."""
        return self._plan.choose_swap(
            table.num_committed, num_tokens, has_host=self._tiers.has_host
        )

    # -- saving -----------------------------------------------------------------------------------

    def has_copies_to_make(self, headroom_blocks: int) -> bool:
        """Whether a copy is not over, or `plan_stores` would begin one."""
        return self.has_copies or bool(self._oldest_unsaved(headroom_blocks))

    @property
    def _is_short_of_free_blocks(self) -> bool:
        return self.pool.num_free < FREE_FRACTION * self.pool.num_blocks

    def plan_stores(self, headroom_blocks: int) -> None:
        """Begin to save blocks in the host tier, if it is time to.

        `headroom_blocks`: device blocks that must stay available, for running sequences are about
        to take them.
        """
        self._store(self._oldest_unsaved(headroom_blocks))  # first: they may be evicted next
        if self._wanted and self._copies.num_stores < MAX_STORES:
            self._store(self._take_wanted(headroom_blocks))

    def _want(self, hashes: Iterable[bytes]) -> None:
        """Note hashes to be saved; where saving does not keep up, the oldest wishes are dropped."""
        self._wanted.update(dict.fromkeys(hashes))
        num_over = len(self._wanted) - self.pool.num_blocks
        for block_hash in list(islice(self._wanted, max(0, num_over))):
            del self._wanted[block_hash]

    def _store(self, blocks: Sequence[int]) -> None:
        if blocks:
            self._copies.store(blocks)

    def _oldest_unsaved(self, headroom_blocks: int) -> list[int]:
        """Return the cached blocks to be saved next: none while there are free ones enough."""
        pool, tiers = self.pool, self._tiers
        if not tiers.num_unsaved or self._copies.num_stores >= MAX_STORES:
            return []
        if not self._is_short_of_free_blocks:
            return []
        # A held block cannot be evicted, so the next ones in line are evicted instead. They must
        # not be what the held ones continue: those that go in any case are left out.
        num_saved = pool.num_cached - tiers.num_unsaved
        num_doomed = max(0, headroom_blocks - pool.num_free - num_saved)
        num_blocks = min(
            self._plan.max_store_blocks(),
            pool.num_available - headroom_blocks,
            tiers.host.num_available,
        )
        return tiers.oldest_unsaved(num_doomed, max(0, num_blocks))

    def _take_wanted(self, headroom_blocks: int) -> list[int]:
        """Take blocks that are to be saved before anybody may evict them."""
        blocks: list[int] = []
        num_spare = self.pool.num_available - headroom_blocks  # cached blocks that a copy may hold
        limit = min(self._plan.max_store_blocks(), self._tiers.host.num_available)
        # The newest first: a prefix's end is stored, and so evicted, before its beginning.
        while self._wanted and len(blocks) < limit:
            block_hash, _ = self._wanted.popitem()
            block = self._tiers.index.find(CacheTier.DEVICE, block_hash)
            if block is None or not self._tiers.can_store(block):
                continue
            if self.pool.is_cached(block):  # in use no more; it is among the unsaved ones too
                if num_spare <= 0:
                    continue
                num_spare -= 1
            blocks.append(block)
        return blocks

    # -- copies -----------------------------------------------------------------------------------

    def take_copies(self) -> tuple[CopyJob, ...]:
        """Return the copies decided since the last call, for the plan that is being made."""
        return self._copies.take()

    def copies_done(self, finished: Iterable[CopyDone]) -> None:
        """Take in copies that ended; tables that waited have no pending copies, or are broken."""
        for done in finished:
            self._copies.done(done)

    # -- the state of things ----------------------------------------------------------------------

    def decisions(self) -> LoadDecisions:
        """Return the counters of decisions."""
        return replace(
            self._plan.decisions(),
            predicted_load_s=self._copies.predicted_load_s,
            actual_load_s=self._copies.actual_load_s,
        )

    def copy_counts(self) -> CopyCounts:
        """Return the counters of copies."""
        return replace(self._copies.counts, num_unsaved_blocks=self._tiers.num_unsaved_evictions)

    def tier_loads(self) -> tuple[TierLoad, TierLoad]:
        """Return the state of (device, host). Of host hits those count whose blocks arrived."""
        num_loaded = self._copies.counts.num_loaded_blocks
        return (
            _tier_load(self._tiers.device, self._num_device_hit_tokens),
            _tier_load(self._tiers.host, num_loaded * self.block_size_tokens),
        )

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Prove that references and holds are those of `tables`, all there are, and of copies."""
        tables = list(tables)
        self._tiers.check_integrity()
        self._copies.check_integrity(tables)
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
        host = self._tiers.host
        assert host.num_used == 0, "a sequence holds host blocks"


def _tier_load(pool: BlockPool, num_hit_tokens: int) -> TierLoad:
    return TierLoad(
        num_blocks=pool.num_blocks,
        num_blocks_free=pool.num_free,
        num_blocks_used=pool.num_used,
        num_blocks_cached=pool.num_cached,
        num_blocks_copying=pool.num_copying,
        num_hit_tokens=num_hit_tokens,
        num_evicted_blocks=pool.num_evicted,
    )
