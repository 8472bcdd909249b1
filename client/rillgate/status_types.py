"""What the operators' call `status()` gives: plain frozen values.

Owns the shapes and the sums over replicas. Knows nothing of the wire.
"""

from dataclasses import dataclass
from enum import Enum


class ReplicaState(Enum):
    """What a replica is doing."""

    NOT_CONNECTED = "not connected"
    READY = "ready"
    DRAINING = "draining"
    """Finishes what it has."""


@dataclass(frozen=True, slots=True)
class TierStatus:
    """Blocks of one tier of the key/value cache."""

    num_blocks: int
    num_blocks_free: int
    num_blocks_used: int
    """Referenced by a request."""
    num_blocks_cached: int
    """Kept for a later prefix hit, given up when memory is short; not counted as used."""


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica, as it last reported."""

    replica_id: str
    incarnation: int
    """Random number of this life of it."""
    model: str
    model_version: str
    state: ReplicaState
    num_running: int
    num_waiting: int
    num_running_tokens: int
    num_waiting_tokens: int
    step_id: int
    """Steps since it started."""
    step_age_ms: float
    """Since its last finished step."""
    prefill_tokens_per_s: float
    """Measured; 0 until then."""
    decode_step_ms: float
    """Measured; 0 until then."""
    device: TierStatus
    block_size_tokens: int
    num_preemptions: int
    """Since its start, like the two below."""
    num_cached_tokens: int
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """The whole server; the properties are sums over its replicas."""

    server_version: str
    uptime_s: float
    num_open_requests: int
    replicas: tuple[ReplicaStatus, ...]

    @property
    def num_running(self) -> int:
        """Count the requests in the running batches."""
        return sum(replica.num_running for replica in self.replicas)

    @property
    def num_waiting(self) -> int:
        """Count the requests that wait."""
        return sum(replica.num_waiting for replica in self.replicas)

    @property
    def num_blocks(self) -> int:
        """Count all blocks in device memory."""
        return sum(replica.device.num_blocks for replica in self.replicas)

    @property
    def num_blocks_free(self) -> int:
        """Count the blocks that hold nothing."""
        return sum(replica.device.num_blocks_free for replica in self.replicas)

    @property
    def num_blocks_used(self) -> int:
        """Count the blocks that requests hold; cached ones are not among them."""
        return sum(replica.device.num_blocks_used for replica in self.replicas)

    @property
    def num_blocks_cached(self) -> int:
        """Count the blocks kept for later prefix hits."""
        return sum(replica.device.num_blocks_cached for replica in self.replicas)

    @property
    def num_preemptions(self) -> int:
        """Count how often a request lost its place, since the replicas' start."""
        return sum(replica.num_preemptions for replica in self.replicas)
