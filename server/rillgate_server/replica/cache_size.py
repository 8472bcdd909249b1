"""How many blocks each tier of the cache gets: a pure decision over bytes.

    device tier   as configured; auto: half of what is free (of a GPU's memory nearly all, what the
                  largest step takes being measured), at most what can be useful
    host tier     as configured; auto: half of the host's free memory, none where both are the same

A tier that is there holds at least one request of the context length: otherwise such a request
could never run, or never be swapped, and nobody would know before it came.
"""

from dataclasses import dataclass

from rillgate_server.config.groups import CacheConfig
from rillgate_server.config.memory_size import parse_memory_size
from rillgate_server.core.model_spec import CacheSizes, FreeMemory
from rillgate_server.errors import ConfigError, OutOfMemory

FREE_MEMORY_FRACTION = 0.5
"""Of what is free once the weights are there, when nothing is configured: the other half is for
activations, the gateway and whoever else lives on the machine."""
MEASURED_FRACTION = 0.95
"""The same where what steps take is known: the rest is for what the allocator leaves unused."""


@dataclass(frozen=True, slots=True)
class CacheDemand:
    """What requests may ask of a cache."""

    max_context_tokens: int
    max_running: int
    block_size_tokens: int
    block_bytes: int
    kv_dtype: str
    draft_block_bytes: int = 0
    """What a draft model keeps beside each block of the device tier."""

    @property
    def device_block_bytes(self) -> int:
        """Of one block in the device tier, with what goes with it."""
        return self.block_bytes + self.draft_block_bytes

    @property
    def num_context_blocks(self) -> int:
        """What one choice at the full context holds: the least that a tier must have."""
        return -(-self.max_context_tokens // self.block_size_tokens)

    @property
    def num_useful_blocks(self) -> int:
        """Twice what `max_running` choices at the full context hold: more would never be touched
        by running requests, and barely by the prefix cache."""
        return 2 * self.max_running * self.num_context_blocks


def choose_cache_sizes(config: CacheConfig, free: FreeMemory, demand: CacheDemand) -> CacheSizes:
    """Return the blocks of both tiers.

    Raises OutOfMemory for sizes that are not free, and ConfigError for a tier that cannot hold one
    request of the context length; both say the numbers.
    """
    host_bytes = _host_bytes(config, free, demand)
    taken_bytes = host_bytes if free.is_shared else 0
    device_bytes = _device_bytes(config, free, taken_bytes, demand)
    return CacheSizes(
        device_bytes // demand.device_block_bytes,
        demand.block_bytes,
        demand.kv_dtype,
        host_bytes // demand.block_bytes,
    )


def _host_bytes(config: CacheConfig, free: FreeMemory, demand: CacheDemand) -> int:
    size = parse_memory_size("cache.host_memory", config.host_memory, may_be_zero=True)
    if not config.uses_host_tier:
        return 0  # nobody would ever read it
    asked_bytes = size.of(free.host_bytes)
    needed_bytes = demand.num_context_blocks * demand.block_bytes
    if asked_bytes is None:
        half = 0 if free.is_shared else int(free.host_bytes * FREE_MEMORY_FRACTION)
        return half if half >= needed_bytes else 0
    if asked_bytes > free.host_bytes:
        raise OutOfMemory("cache.host_memory", asked_bytes, free.host_bytes)
    if 0 < asked_bytes < needed_bytes:
        given = f"cache.host_memory is {config.host_memory!r}"
        too_small = _too_small(given, asked_bytes, demand, demand.block_bytes)
        raise ConfigError(f"{too_small}, or 0 for no host tier")
    return asked_bytes


def _device_bytes(
    config: CacheConfig, free: FreeMemory, taken_bytes: int, demand: CacheDemand
) -> int:
    """Return the device tier's bytes; `taken_bytes` of the free ones are the host tier's."""
    free_bytes = free.device_bytes
    size = parse_memory_size("cache.device_memory", config.device_memory, may_be_zero=False)
    asked_bytes = size.of(free_bytes)
    given = f"cache.device_memory is {config.device_memory!r}"
    if asked_bytes is None:
        fraction = MEASURED_FRACTION if free.is_measured else FREE_MEMORY_FRACTION
        part_bytes = int((free_bytes - taken_bytes) * fraction)
        asked_bytes = min(part_bytes, demand.num_useful_blocks * demand.device_block_bytes)
        given += f" ({fraction} of the {free_bytes - taken_bytes} bytes that are free)"
    elif asked_bytes + taken_bytes > free_bytes:
        both = " and cache.host_memory together" if taken_bytes else ""
        raise OutOfMemory(f"cache.device_memory{both}", asked_bytes + taken_bytes, free_bytes)
    if asked_bytes < demand.num_context_blocks * demand.device_block_bytes:
        raise ConfigError(_too_small(given, asked_bytes, demand, demand.device_block_bytes))
    return asked_bytes


def _too_small(given: str, given_bytes: int, demand: CacheDemand, block_bytes: int) -> str:
    """Say what a tier has, what it must have, and what can be done."""
    num_blocks = demand.num_context_blocks
    return (
        f"{given}: {given_bytes // block_bytes} blocks of {block_bytes} bytes, but "
        f"one request of the context length, {demand.max_context_tokens} tokens, needs "
        f"{num_blocks} blocks, {num_blocks * block_bytes} bytes; allowed: at least that, or "
        f"a lower model.max_context_tokens"
    )
