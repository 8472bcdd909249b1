"""How many blocks the cache gets: a pure decision over bytes."""

from dataclasses import dataclass

from rillgate_server.errors import OutOfMemory

FREE_MEMORY_FRACTION = 0.5
"""Of what is free once the weights are there, when nothing is configured: the other half is for
activations, the gateway and whoever else lives on the machine."""
_MIN_AUTOMATIC_BLOCKS = 16  # less holds no conversation: better said at the start


@dataclass(frozen=True, slots=True)
class CacheDemand:
    """What could be used at most: more than twice of it would never be touched by running
    requests, and barely by the prefix cache."""

    max_context_tokens: int
    max_running: int
    block_size_tokens: int

    @property
    def max_useful_blocks(self) -> int:
        """Twice what `max_running` choices at the full context hold."""
        blocks_per_choice = -(-self.max_context_tokens // self.block_size_tokens)
        return 2 * self.max_running * blocks_per_choice


def choose_num_blocks(
    memory_bytes: int | None, free_bytes: int, block_bytes: int, demand: CacheDemand
) -> int:
    """Return how many blocks of `block_bytes` fit into what is configured, or into a share.

    Raises OutOfMemory, which says needed and free, when the configured size is not free, or the
    share (None configured) holds next to nothing.
    """
    if memory_bytes is not None:
        if memory_bytes > free_bytes:
            raise OutOfMemory("cache.memory_bytes", memory_bytes, free_bytes)
        if memory_bytes < block_bytes:
            raise OutOfMemory("one cache block", block_bytes, memory_bytes)
        return memory_bytes // block_bytes
    num_blocks = int(free_bytes * FREE_MEMORY_FRACTION) // block_bytes
    if num_blocks < _MIN_AUTOMATIC_BLOCKS:
        needed_bytes = int(_MIN_AUTOMATIC_BLOCKS * block_bytes / FREE_MEMORY_FRACTION)
        raise OutOfMemory(
            f"a cache of {_MIN_AUTOMATIC_BLOCKS} blocks in half of the free memory",
            needed_bytes,
            free_bytes,
        )
    return min(num_blocks, demand.max_useful_blocks)
