"""The groups of settings: frozen, plain, each field with unit, range and what raising it does.

Standard library only, so that the pure packages can take a group as an argument. Where values
come from (TOML, environment, flags) is config.settings' business.
"""

from dataclasses import dataclass

from rillgate_server.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BatcherConfig:
    """What a step may hold and how much may wait."""

    max_step_tokens: int = 2048
    """Tokens computed in one step, 1 to 1,048,576. Higher: faster prefill, longer gaps between the
    tokens of running streams."""
    max_prefill_chunk_tokens: int = 512
    """Prefill tokens in a step that also decodes, 1 to max_step_tokens. Higher: the same."""
    max_running: int = 64
    """Choices that run at once, 1 to 4096. Higher: more throughput, slower tokens for each."""
    max_waiting_requests: int = 1024
    """Requests in the queue. Higher: fewer refusals, longer waits."""
    max_waiting_tokens: int = 1_048_576
    """Prompt tokens in the queue. Higher: the same."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of its range."""
        _check("batcher.max_step_tokens", self.max_step_tokens, 1, 1 << 20)
        _check("batcher.max_prefill_chunk_tokens", self.max_prefill_chunk_tokens, 1, 1 << 20)
        _check("batcher.max_running", self.max_running, 1, 4096)
        _check("batcher.max_waiting_requests", self.max_waiting_requests, 1, 1 << 20)
        _check("batcher.max_waiting_tokens", self.max_waiting_tokens, 1, 1 << 40)
        if self.max_step_tokens < self.max_running:
            raise ConfigError(
                f"batcher.max_step_tokens is {self.max_step_tokens}; allowed: at least "
                f"batcher.max_running, {self.max_running} (each running choice takes one token)"
            )


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The key/value cache's device tier."""

    memory_bytes: int | None = None
    """Bytes for the cache; None: a share of the free memory (config.settings resolves it)."""
    block_size_tokens: int = 16
    """Tokens per block, 1 to 256. Higher: less bookkeeping, coarser prefix hits."""
    prefix_caching: bool = True
    """Keeps full blocks for later requests with the same beginning."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of its range."""
        _check("cache.block_size_tokens", self.block_size_tokens, 1, 256)
        if self.memory_bytes is not None:
            _check("cache.memory_bytes", self.memory_bytes, 1 << 16, 1 << 50)


def _check(field: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise ConfigError(f"{field} is {value}; allowed: {lowest} to {highest}")
