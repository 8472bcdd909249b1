"""The blocks of one tier: which are free, which are used and how often, which may be evicted.

Owns the free list, the references, the copies' holds and the order of eviction. Does not know
hashes, sequences, or what is in a block: who hands a block back says whether it is worth keeping,
and whether a block has children is asked. One class for every tier.

Every operation costs O(blocks it handles), times the logarithm of the pool's size where blocks are
cached; only making the pool and `check_integrity` walk over all of it.
"""

from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush

_MIN_STALE_ENTRIES = 64
"""Entries of the eviction order that may be out of date before it is made anew."""


class BlockPool:
    """A fixed number of blocks, 0 to num_blocks - 1.

    State, and what moves a block from one place to the next:

                  allocate                    release, to 0 refs, kept
        FREE ───────────────▶ USED(refs ≥ 1) ─────────────────────────▶ CACHED(oldest first)
          ▲                     │        ▲                                │        │
          │ release, to 0 refs  │        └────────────────────────────────┘        │
          └─────────────────────┘                   acquire                        │
                                ▲                                                  │
                                └──────────────────────────────────────────────────┘
                                         allocate, when no block is FREE: evicted

    A copy holds a block beside its references. Without references a held block is COPYING: it
    comes from USED or CACHED, keeps its age, and goes to CACHED or FREE with its last hold.

        USED ──release──▶ COPYING ──unhold──▶ CACHED | FREE        COPYING ──acquire──▶ USED
        CACHED ──hold───▶ COPYING

    free + used + cached + copying == total, always.
    """

    def __init__(
        self,
        num_blocks: int,
        has_children: Callable[[int], bool] = lambda block: False,
        on_evict: Callable[[int], None] = lambda block: None,
    ) -> None:
        """Make a pool in which every block is free.

        `has_children` tells whether a cached block's contents have a continuation in this tier:
        such a block is evicted after those, whatever its age. `on_evict` is called for each block
        that loses its contents for room, before the next one is chosen.
        """
        assert num_blocks >= 0
        self.num_blocks = num_blocks
        self.num_evicted = 0
        self._has_children = has_children
        self._on_evict = on_evict
        self._refs = [0] * num_blocks  # block -> references; 0 unless USED
        self._holds = [0] * num_blocks  # block -> copies that hold it
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low numbers first
        self._cached: dict[int, int] = {}  # CACHED block -> its age: the tick of its last release
        self._order: list[tuple[int, int]] = []  # heap of (age, block); some are out of date
        self._ages = [0] * num_blocks  # block -> tick of its last release
        self._tick = 0
        self.num_copying = 0
        """Blocks that a copy alone holds."""

    def __repr__(self) -> str:
        return (
            f"BlockPool(total={self.num_blocks}, free={self.num_free}, used={self.num_used}, "
            f"cached={self.num_cached}, copying={self.num_copying})"
        )

    @property
    def num_free(self) -> int:
        """Blocks with nothing in them."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody uses, kept until their room is needed."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - len(self._free) - len(self._cached) - self.num_copying

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    def num_refs(self, block: int) -> int:
        """Return how many hold a reference to the block."""
        return self._refs[block]

    def num_holds(self, block: int) -> int:
        """Return how many copies hold the block."""
        return self._holds[block]

    def is_cached(self, block: int) -> bool:
        """Tell whether the block is kept, unused, and in no copy."""
        return block in self._cached

    def cached_blocks(self) -> list[int]:
        """Return all cached blocks, in no promised order."""
        return list(self._cached)

    # -- references -------------------------------------------------------------------------------

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks with one reference each; the caller checks `num_available` before.

        Free blocks go first, then the cached ones that were released longest ago.
        """
        assert num_blocks <= self.num_available, (num_blocks, self)
        num_from_free = min(num_blocks, len(self._free))
        blocks = [self._free.pop() for _ in range(num_from_free)]
        blocks += self._evict(num_blocks - num_from_free)
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block: used, cached or copying."""
        for block in blocks:
            if self._refs[block] == 0:
                if self._holds[block]:
                    self.num_copying -= 1
                else:
                    del self._cached[block]  # a KeyError here: the block was free
            self._refs[block] += 1

    def release(self, blocks: Sequence[int], kept: Iterable[bool]) -> None:
        """Take one reference from each; without any left, a kept block is cached, others are free.

        What a copy holds is decided with its last hold. The order is the order of eviction, so a
        sequence releases its blocks last first: a prefix is worth nothing without its beginning.
        """
        for block, is_kept in zip(blocks, kept, strict=True):
            assert self._refs[block] > 0, f"block {block} is released more often than acquired"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._ages[block] = self._next_tick()
                if self._holds[block]:
                    self.num_copying += 1
                else:
                    self._put_away(block, is_kept=is_kept)

    # -- copies -----------------------------------------------------------------------------------

    def hold(self, blocks: Iterable[int]) -> None:
        """Let a copy own each block, used or cached, until `unhold`."""
        for block in blocks:
            if self._refs[block] == 0 and self._holds[block] == 0:
                del self._cached[block]  # a KeyError here: the block was free
                self.num_copying += 1
            self._holds[block] += 1

    def unhold(self, block: int, *, is_kept: bool, is_touched: bool = False) -> None:
        """End one hold; an unreferenced block without holds is cached (at its age) or free.

        `is_touched`: it counts as used now.
        """
        assert self._holds[block] > 0, f"block {block} is in no copy"
        self._holds[block] -= 1
        if is_touched:
            self._ages[block] = self._next_tick()
        if self._holds[block] == 0 and self._refs[block] == 0:
            self.num_copying -= 1
            self._put_away(block, is_kept=is_kept)

    # -- eviction ---------------------------------------------------------------------------------

    def drop(self, blocks: Iterable[int]) -> None:
        """Free cached blocks."""
        for block in blocks:
            del self._cached[block]
            self._free.append(block)

    def _put_away(self, block: int, *, is_kept: bool) -> None:
        if is_kept:
            age = self._ages[block]
            self._cached[block] = age
            heappush(self._order, (age, block))
            if len(self._order) > 2 * len(self._cached) + _MIN_STALE_ENTRIES:
                self._order = [(age, block) for block, age in self._cached.items()]
                heapify(self._order)
        else:
            self._free.append(block)

    def _evict(self, num_blocks: int) -> list[int]:
        """Take the oldest cached blocks, leaves before what they continue."""
        evicted: list[int] = []
        num_deferred, max_deferred = 0, len(self._cached)
        while len(evicted) < num_blocks:
            age, block = heappop(self._order)
            if self._cached.get(block) != age:
                continue  # acquired since, or put away again at another age
            del self._cached[block]
            # A parent whose continuation is still here is as good as new. The count ends a walk in
            # circles: a continuation may be in use, computed over a second copy of its parent.
            if num_deferred < max_deferred and self._has_children(block):
                num_deferred += 1
                self._ages[block] = self._next_tick()
                self._put_away(block, is_kept=True)
                continue
            evicted.append(block)
            self._on_evict(block)
        self.num_evicted += len(evicted)
        return evicted

    def _next_tick(self) -> int:
        self._tick += 1
        return self._tick

    def check_integrity(self) -> None:
        """Prove that each block is in exactly one place. Costs O(num_blocks)."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & self._cached.keys(), "a block is free and cached"
        num_used = num_copying = 0
        for block in range(self.num_blocks):
            refs, holds = self._refs[block], self._holds[block]
            is_idle = block in free or block in self._cached
            assert is_idle == (refs == 0 and holds == 0), (
                f"block {block} has {refs} references and {holds} holds, idle: {is_idle}"
            )
            num_used += refs > 0
            num_copying += refs == 0 and holds > 0
        assert num_copying == self.num_copying
        assert self.num_used == num_used
        entries = set(self._order)
        for block, age in self._cached.items():
            assert (age, block) in entries, f"block {block} is cached and would never be evicted"
