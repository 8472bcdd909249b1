"""What a replica says of itself once, when a gateway begins to watch it.

Constant for the life of a replica process. What changes is core.load's.
"""

from dataclasses import dataclass

PROTOCOL_VERSION = 1
"""Of engine.proto; a gateway refuses a replica that speaks another."""


@dataclass(frozen=True, slots=True)
class Welcome:
    """A replica's name, its model and its limits."""

    replica_id: str
    incarnation: int
    """Random at each start, 64 bits."""
    model: str
    model_version_digest: str
    tokenizer_digest: str
    """A gateway that encodes with another tokenizer refuses the replica."""
    vocab_size: int
    max_context_tokens: int
    block_size_tokens: int
    hash_scheme: str
    kv_dtype: str
    """The cache's element type."""
    max_running: int
    """Most choices that run at once."""
    tensor_parallel_size: int = 1
    protocol_version: int = PROTOCOL_VERSION
