"""A cache manager with its tables, whose integrity is proved after every call."""

from collections.abc import Sequence

from rillgate_server.core.block_hash import root_hash
from rillgate_server.core.request import NO_SALT
from rillgate_server.core.step import CopyDirection, CopyDone, CopyJob
from rillgate_server.kvcache.block_table import BlockTable
from rillgate_server.kvcache.cost_model import CostModel
from rillgate_server.kvcache.manager import KVCacheManager
from rillgate_server.kvcache.tier_plan import CachePolicy

SIZE = 4
BLOCK_BYTES = 1000
ROOT = root_hash("00", "float32", SIZE)
TOKENS = list(range(100, 114))  # 3 full blocks of 4, and 2 tokens
LONG = [*TOKENS, 1, 2]  # 4 full blocks
OTHER_SALT = bytes(15) + b"x"
OUT, IN = CopyDirection.DEVICE_TO_HOST, CopyDirection.HOST_TO_DEVICE


class Cache:
    """A manager with blocks of 4 tokens, and every table that it knows."""

    def __init__(
        self,
        num_blocks: int = 8,
        num_host_blocks: int = 0,
        *,
        prefix_caching: bool = True,
        load_policy: str = "load",
    ) -> None:
        """Start empty."""
        self.costs = CostModel()
        policy = CachePolicy(SIZE, BLOCK_BYTES, ROOT, prefix_caching, load_policy)
        self.manager = KVCacheManager(num_blocks, num_host_blocks, policy, self.costs)
        self.tables: list[BlockTable] = []

    def start(
        self,
        tokens: Sequence[int],
        salt: bytes = NO_SALT,
        num_shared_tokens: int = 0,
        headroom_blocks: int = 0,
    ) -> tuple[BlockTable, int | None]:
        """Start a sequence; return its table and the tokens found, None: there was no room."""
        table = BlockTable(salt, num_shared_tokens)
        found = self.manager.try_start(table, tokens, headroom_blocks=headroom_blocks)
        if found is not None:
            self.tables.append(table)
        self.check()
        return table, None if found is None else found.num_hit_tokens

    def compute(self, tokens: Sequence[int], salt: bytes = NO_SALT) -> BlockTable:
        """Start a sequence and compute all of it."""
        table, found = self.start(tokens, salt)
        assert found is not None
        self.manager.commit(table, tokens, len(tokens))
        return table

    def free(self, table: BlockTable, *, is_saved_later: bool = True) -> None:
        """Let a sequence go."""
        self.manager.free(table, is_saved_later=is_saved_later)
        self.tables.remove(table)
        self.check()

    def visit(self, first_token: int) -> None:
        """Compute a prompt of two full blocks that nobody else has, and let it go."""
        self.free(self.compute(range(first_token, first_token + 9)))

    def copies(self) -> tuple[CopyJob, ...]:
        """Begin to save what should be saved; return the copies that begin now."""
        self.manager.plan_stores(0)
        self.check()
        return self.manager.take_copies()

    def end(self, job: CopyJob, *failed_pairs: int, checksums: tuple[int, ...] = ()) -> None:
        """Report a copy."""
        num_bytes = BLOCK_BYTES * (len(job.pairs) - len(failed_pairs))
        num_refused = len(failed_pairs) if job.checksums else 0
        done = CopyDone(
            job.copy_id, failed_pairs, num_bytes, 1e-3, checksums, num_refused=num_refused
        )
        self.manager.copies_done([done])
        self.check()

    def save(self) -> int:
        """Save all that should be saved; return the number of blocks."""
        num_blocks = 0
        while jobs := self.copies():
            for job in jobs:
                num_blocks += len(job.pairs)
                self.end(job)
        return num_blocks

    def check(self) -> None:
        """Prove the manager's integrity."""
        self.manager.check_integrity(self.tables)
