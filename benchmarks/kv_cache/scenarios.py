"""What is compared: workloads, cache sizes, speeds of the host tier, and the contestants.

Sizes are in tokens here; a machine's runner makes blocks of them.
"""

from dataclasses import dataclass

from benchmarks.kv_cache.copies import CopySpeed
from benchmarks.kv_cache.workload import Workload
from rillgate_server.config.groups import CacheConfig
from rillgate_server.core.model_spec import CacheSizes


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to use the cache."""

    name: str
    load_policy: str
    """Of CacheConfig."""
    prefix_caching: bool = True
    has_host: bool = True

    @property
    def cache(self) -> CacheConfig:
        """Its settings."""
        return CacheConfig(load_policy=self.load_policy, prefix_caching=self.prefix_caching)


_SLOW_LATENCY_S = 0.005
"""Of a copy of the slow tier."""

NO_CACHE = Contestant("no_cache", "auto", prefix_caching=False, has_host=False)
DEVICE_TIER = Contestant("device_tier", "auto", has_host=False)
LOAD_ALWAYS = Contestant("load_always", "load")
RECOMPUTE_ALWAYS = Contestant("recompute_always", "recompute")
COST_MODEL = Contestant("cost_model", "auto")


@dataclass(frozen=True, slots=True)
class Scenario:
    """Users, and the cache that they share."""

    name: str
    workload: Workload
    device_fraction: float = 1 / 3
    """Of the working set that the device tier holds; the host tier holds all of it."""
    load_over_compute: float | None = None
    """What loading a token takes over what computing it takes; None: the machine's own speed."""

    def host_speed(self, prefill_tokens_per_s: float, block_bytes: int) -> CopySpeed | None:
        """Return how fast copies are to be made; None: as fast as the machine can."""
        if self.load_over_compute is None:
            return None
        bytes_per_token = block_bytes / CacheConfig().block_size_tokens
        bytes_per_s = bytes_per_token * prefill_tokens_per_s / self.load_over_compute
        return CopySpeed(_SLOW_LATENCY_S, bytes_per_s)

    def cache_sizes(self, contestant: Contestant, block_bytes: int, kv_dtype: str) -> CacheSizes:
        """Return both tiers' sizes; at least the longest request fits into the device tier."""
        workload, block_tokens = self.workload, contestant.cache.block_size_tokens
        fraction_tokens = int(workload.working_set_tokens * self.device_fraction)
        num_thoughts = workload.num_users * workload.num_turns * workload.num_thought_tokens
        num_host_tokens = int(1.2 * (workload.working_set_tokens + num_thoughts))
        return CacheSizes(
            max(fraction_tokens, workload.longest_tokens) // block_tokens + 2,
            block_bytes,
            kv_dtype,
            num_host_tokens // block_tokens if contestant.has_host else 0,
        )


CONVERSATIONS = Scenario(
    "conversations",
    Workload(
        num_users=40,
        num_turns=6,
        num_system_tokens=1000,
        num_first_tokens=300,
        num_question_tokens=40,
        num_thought_tokens=10,
        num_reply_tokens=10,
        think_s=6.0,
    ),
)
"""Many users with a long common beginning: the working set is three times the device tier."""

SHORT_PREFIXES = Scenario(
    "short_prefixes", Workload(16, 8, 0, 96, 16, 8, 8, think_s=1.0), device_fraction=0.35
)
LONG_PREFIXES = Scenario(
    "long_prefixes", Workload(8, 8, 0, 1200, 32, 8, 8, think_s=1.5), device_fraction=0.5
)
SLOW_TIER = Scenario(
    "slow_tier", Workload(12, 6, 0, 500, 48, 8, 8, think_s=1.5), 0.4, load_over_compute=3.0
)
DECISIONS = (SHORT_PREFIXES, LONG_PREFIXES, SLOW_TIER)
"""Where the cost model is compared with loading always and computing always."""
