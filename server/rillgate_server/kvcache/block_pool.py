"""The blocks of one tier: which are free, which are used and how often, which may be evicted.

Owns the count of references of each block and the order of eviction. Does not know hashes,
sequences, or what is in a block: who hands a block back says whether it is worth keeping. One
class for every tier.

Every operation costs O(blocks it handles), whatever the pool's size; only making the pool and
`check_integrity` walk over all of it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


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

    free + used + cached == total, always.
    """

    def __init__(self, num_blocks: int) -> None:
        """Make a pool in which every block is free."""
        assert num_blocks >= 0
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks  # block -> references; 0 when FREE or CACHED
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low numbers first
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    def __repr__(self) -> str:
        return (
            f"BlockPool(total={self.num_blocks}, free={self.num_free}, used={self.num_used}, "
            f"cached={self.num_cached})"
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
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    def num_refs(self, block: int) -> int:
        """Return how many hold the block."""
        return self._refs[block]

    def allocate(self, num_blocks: int) -> tuple[list[int], list[int]]:
        """Take blocks with one reference each; return (blocks, those of them that were evicted).

        Free blocks go first, then the cached ones that were released longest ago. The caller
        checks `num_available` before, and forgets what the evicted blocks held.
        """
        assert num_blocks <= self.num_available, (num_blocks, self)
        num_from_free = min(num_blocks, len(self._free))
        blocks = [self._free.pop() for _ in range(num_from_free)]
        evicted = [self._cached.popitem(last=False)[0] for _ in range(num_blocks - num_from_free)]
        blocks += evicted
        for block in blocks:
            self._refs[block] = 1
        return blocks, evicted

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block, used or cached."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._cached[block]  # a KeyError here: the block was free
            self._refs[block] += 1

    def release(self, blocks: Sequence[int], kept: Iterable[bool]) -> None:
        """Take one reference from each; without any left, a kept block is cached, others are free.

        The order is the order of eviction, so a sequence releases its blocks last first: a prefix
        is worth nothing without its beginning.
        """
        for block, is_kept in zip(blocks, kept, strict=True):
            assert self._refs[block] > 0, f"block {block} is released more often than acquired"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if is_kept:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def drop_cached(self) -> list[int]:
        """Free all cached blocks and return them."""
        dropped = list(self._cached)
        self._cached.clear()
        self._free.extend(dropped)
        return dropped

    def is_cached(self, block: int) -> bool:
        """Tell whether the block is kept and unused."""
        return block in self._cached

    def check_integrity(self) -> None:
        """Prove that each block is in exactly one place. Costs O(num_blocks)."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & self._cached.keys(), "a block is free and cached"
        for block, refs in enumerate(self._refs):
            is_idle = block in free or block in self._cached
            assert is_idle == (refs == 0), f"block {block} has {refs} references, idle: {is_idle}"
        assert self.num_free + self.num_used + self.num_cached == self.num_blocks
