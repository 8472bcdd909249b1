"""The copies between the tiers: which are under way, what they hold, what they were for.

Owns every copy from its decision to its report, and the rule that a block in a copy belongs to the
copy. Does not decide what is copied (kvcache.manager does), nor copy (the worker does).

    decided ──take──▶ in a plan ──done──▶ over        sources and targets are held from the decision
                                                      on; a target is found in the index of
        load    device target, found at once, but     the device tier at once: who hits it waits too
                "arriving" until the end
        store   host target, found from the end on

When a pair fails, its target is worth nothing: a load's waiters are broken (they free what they
hold, and start anew without this block, whose host twin is dropped), a store's target is free.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from rillgate_server.core.block_events import CacheTier
from rillgate_server.core.load import CopyCounts
from rillgate_server.core.step import CopyDirection, CopyDone, CopyJob
from rillgate_server.kvcache.block_table import BlockTable
from rillgate_server.kvcache.cost_model import CostModel
from rillgate_server.kvcache.tiers import Tiers


@dataclass(slots=True)
class _Copy:
    """One copy that is not over."""

    job: CopyJob
    hashes: tuple[bytes, ...]
    """Of the pairs."""
    parents: tuple[bytes | None, ...]
    predicted_s: float
    """For the copy itself, without the wait behind others."""
    waiters: list[BlockTable] = field(default_factory=list)


class CopyTraffic:
    """The copies of one cache.

    State: the copies that are not over, those of them that no plan carries yet, which device
    blocks arrive with which, the checksums of host blocks (audit mode), and counters.
    """

    def __init__(self, tiers: Tiers, block_bytes: int, costs: CostModel) -> None:
        """Copy blocks of `block_bytes` between `tiers`; `costs` learns from each."""
        self.counts = CopyCounts()
        self.num_stores = 0
        """Stores that are not over."""
        self.predicted_load_s = 0.0
        """Of all loads that ended well, and what they took: the copies themselves, no waits."""
        self.actual_load_s = 0.0
        self._tiers = tiers
        self._block_bytes = block_bytes
        self._costs = costs
        self._copies: dict[int, _Copy] = {}  # copy id -> copy
        self._untaken: list[_Copy] = []
        self._arriving: dict[int, int] = {}  # device block -> id of the load that brings it
        self._checksums: dict[int, int] = {}  # host block -> checksum
        self._last_id = 0

    def __repr__(self) -> str:
        return f"CopyTraffic(copies={sorted(self._copies)}, untaken={len(self._untaken)})"

    @property
    def num_copies(self) -> int:
        """Copies that are not over."""
        return len(self._copies)

    def load_s(self, num_blocks: int) -> float:
        """Predict when so many blocks, asked for now, are there; 0 while nothing was measured."""
        own_s = self._costs.load_s(num_blocks * self._block_bytes)
        return own_s and own_s + sum(copy.predicted_s for copy in self._copies.values())

    # -- begin ------------------------------------------------------------------------------------

    def load(self, table: BlockTable, positions: Sequence[int]) -> None:
        """Bring a table's blocks at `positions` from the host tier; the table waits for them."""
        index = self._tiers.index
        hashes = tuple(table.hashes[i] for i in positions)
        parents = tuple(table.parent_of(i) for i in positions)
        sources = [index.find(CacheTier.HOST, block_hash) for block_hash in hashes]
        targets = [table.blocks[i] for i in positions]
        pairs = tuple(
            (source, target)
            for source, target in zip(sources, targets, strict=True)
            if source is not None
        )
        assert len(pairs) == len(positions), "a hit in the host tier is gone"
        copy = self._begin(CopyDirection.HOST_TO_DEVICE, pairs, hashes, parents)
        self._tiers.host.hold(source for source, _ in pairs)
        self._tiers.device.hold(targets)
        for block_hash, parent, target in zip(hashes, parents, targets, strict=True):
            is_added = index.add(CacheTier.DEVICE, block_hash, target, parent)
            assert is_added, "a block is loaded that is there"
            self._arriving[target] = copy.job.copy_id
        self._let_wait(table, copy)

    def wait_for(self, table: BlockTable, blocks: Iterable[int]) -> None:
        """Let a table that hit `blocks` wait for those that others are loading."""
        for copy_id in {self._arriving[block] for block in blocks if block in self._arriving}:
            self._let_wait(table, self._copies[copy_id])

    def store(self, blocks: Sequence[int]) -> None:
        """Copy indexed device blocks to the host tier, whose oldest blocks make room."""
        index = self._tiers.index
        hashes = []
        for block in blocks:
            block_hash = index.hash_of(CacheTier.DEVICE, block)
            assert block_hash is not None, f"block {block} is stored and nobody can find it"
            hashes.append(block_hash)
        self._tiers.hold_for_store(blocks)  # first: room in the host tier may cost a twin's place
        targets = self._tiers.host.allocate(len(blocks))
        self._tiers.host.hold(targets)
        self._tiers.host.release(targets, [False] * len(targets))
        self._begin(
            CopyDirection.DEVICE_TO_HOST,
            tuple(zip(blocks, targets, strict=True)),
            tuple(hashes),
            tuple(map(index.parent_of, hashes)),
        )
        self.num_stores += 1

    def stop_waiting(self, table: BlockTable) -> None:
        """Let a table go that is freed; its copies run on."""
        for copy_id in table.pending_copies:
            self._copies[copy_id].waiters.remove(table)
        table.pending_copies.clear()
        table.is_broken = False

    def _begin(
        self,
        direction: CopyDirection,
        pairs: tuple[tuple[int, int], ...],
        hashes: tuple[bytes, ...],
        parents: tuple[bytes | None, ...],
    ) -> _Copy:
        self._last_id += 1
        num_bytes = len(pairs) * self._block_bytes
        is_load = direction is CopyDirection.HOST_TO_DEVICE
        predicted_s = self._costs.load_s(num_bytes) if is_load else self._costs.store_s(num_bytes)
        checksums = None
        if is_load and self._checksums:
            checksums = tuple(self._checksums[source] for source, _ in pairs)
        job = CopyJob(self._last_id, direction, pairs, checksums)
        copy = self._copies[self._last_id] = _Copy(job, hashes, parents, predicted_s)
        self._untaken.append(copy)
        return copy

    @staticmethod
    def _let_wait(table: BlockTable, copy: _Copy) -> None:
        table.pending_copies.add(copy.job.copy_id)
        copy.waiters.append(table)

    def take(self) -> tuple[CopyJob, ...]:
        """Return the copies decided since the last call, for the plan that is being made."""
        jobs = tuple(copy.job for copy in self._untaken)
        self._untaken.clear()
        return jobs

    # -- end --------------------------------------------------------------------------------------

    def done(self, finished: CopyDone) -> None:
        """Take in a copy's end. Unknown ids are our bug."""
        copy = self._copies.pop(finished.copy_id)
        direction, failed = copy.job.direction, frozenset(finished.failed_pairs)
        is_load = direction is CopyDirection.HOST_TO_DEVICE
        if finished.num_bytes and not failed:
            self._costs.copy_done(direction, finished.num_bytes, finished.seconds)
            self.predicted_load_s += copy.predicted_s if is_load else 0.0
            self.actual_load_s += finished.seconds if is_load else 0.0
        if is_load:
            self._loaded(copy, failed)
        else:
            self._stored(copy, failed, finished.checksums)
            self.num_stores -= 1
        self._count(copy.job, finished)

    def _loaded(self, copy: _Copy, failed: frozenset[int]) -> None:
        tiers = self._tiers
        for table in copy.waiters:
            table.pending_copies.discard(copy.job.copy_id)
            table.is_broken = table.is_broken or bool(failed)
        # Last first: unused ones are evicted in this order, a prefix's end before its beginning.
        for position, (source, target) in reversed(list(enumerate(copy.job.pairs))):
            del self._arriving[target]
            if position in failed:
                for tier, block in ((CacheTier.DEVICE, target), (CacheTier.HOST, source)):
                    if tiers.index.hash_of(tier, block) is not None:
                        tiers.remove(tier, block)
            tiers.unhold(CacheTier.DEVICE, target)
            tiers.unhold(CacheTier.HOST, source, is_touched=True)

    def _stored(self, copy: _Copy, failed: frozenset[int], checksums: Sequence[int]) -> None:
        tiers = self._tiers
        for position, (source, target) in enumerate(copy.job.pairs):
            block_hash = copy.hashes[position]
            # Unless it was forgotten meanwhile: then nobody may find its twin either.
            is_wanted = (
                tiers.index.hash_of(CacheTier.DEVICE, source) == block_hash
                and tiers.index.find(CacheTier.HOST, block_hash) is None
            )
            if is_wanted and position not in failed:
                is_added = tiers.index.add(
                    CacheTier.HOST, block_hash, target, copy.parents[position]
                )
                assert is_added, "a block was stored that is there"
                if checksums:
                    self._checksums[target] = checksums[position]
            tiers.unhold(CacheTier.HOST, target, is_touched=True)
            tiers.unhold(CacheTier.DEVICE, source)

    def _count(self, job: CopyJob, finished: CopyDone) -> None:
        counts, num_failed = self.counts, len(finished.failed_pairs)
        num_blocks = len(job.pairs) - num_failed
        if job.direction is CopyDirection.DEVICE_TO_HOST:
            counts = replace(
                counts,
                num_stored_blocks=counts.num_stored_blocks + num_blocks,
                num_stored_bytes=counts.num_stored_bytes + finished.num_bytes,
            )
        else:
            counts = replace(
                counts,
                num_loaded_blocks=counts.num_loaded_blocks + num_blocks,
                num_loaded_bytes=counts.num_loaded_bytes + finished.num_bytes,
            )
        self.counts = replace(
            counts,
            num_refused_blocks=counts.num_refused_blocks + finished.num_refused,
            num_failed_blocks=counts.num_failed_blocks + num_failed - finished.num_refused,
        )

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Prove that holds are exactly those of the copies, and that waiters know each other."""
        num_holds: dict[tuple[CacheTier, int], int] = {}
        for copy in self._copies.values():
            is_load = copy.job.direction is CopyDirection.HOST_TO_DEVICE
            for source, target in copy.job.pairs:
                device, host = (target, source) if is_load else (source, target)
                for held in ((CacheTier.DEVICE, device), (CacheTier.HOST, host)):
                    num_holds[held] = num_holds.get(held, 0) + 1
                assert is_load == (self._arriving.get(device) == copy.job.copy_id)
        for tier, pool in (
            (CacheTier.DEVICE, self._tiers.device),
            (CacheTier.HOST, self._tiers.host),
        ):
            for block in range(pool.num_blocks):
                num_copies = num_holds.get((tier, block), 0)
                assert num_copies == pool.num_holds(block), (
                    f"{tier.name} block {block} is in {num_copies} copies and has "
                    f"{pool.num_holds(block)} holds"
                )
        waiting = {id(table): table.pending_copies for table in tables if table.pending_copies}
        known: dict[int, set[int]] = {}
        for copy_id, copy in self._copies.items():
            for table in copy.waiters:
                known.setdefault(id(table), set()).add(copy_id)
        assert waiting == known, "a table and its copies disagree on who waits"
        num_stores = sum(
            copy.job.direction is CopyDirection.DEVICE_TO_HOST for copy in self._copies.values()
        )
        assert num_stores == self.num_stores
