"""What the operators' call `status()` gives: plain frozen values.

Owns the shapes and the sums over replicas. Knows nothing of the wire.
"""

from dataclasses import dataclass
from enum import Enum

from rillgate.types import Priority


class ReplicaState(Enum):
    """What a replica is doing."""

    NOT_CONNECTED = "not connected"
    READY = "ready"
    DRAINING = "draining"
    """Finishes what it has."""
    FROZEN = "frozen"
    """Has work and makes no progress."""


@dataclass(frozen=True, slots=True)
class TierStatus:
    """Blocks of one tier of the key/value cache now, and counts since the replica's start."""

    num_blocks: int
    num_blocks_free: int
    num_blocks_used: int
    """Referenced by a request."""
    num_blocks_cached: int
    """Kept for a later prefix hit, given up when memory is short; not counted as used."""
    num_blocks_copying: int = 0
    """In flight: held by a copy between the tiers alone."""
    num_hit_tokens: int = 0
    """Prompt and replayed tokens that were found here and used."""
    num_evicted_blocks: int = 0
    """Cached blocks given up for room."""
    num_blocks_pageable: int = 0
    """Whose memory could not be pinned, so that a GPU copies them slowly; 0 without a GPU."""


@dataclass(frozen=True, slots=True)
class CopyStatus:
    """Copies between the tiers, since the replica's start."""

    num_stored_blocks: int = 0
    """Device to host."""
    num_stored_bytes: int = 0
    num_loaded_blocks: int = 0
    """Host to device."""
    num_loaded_bytes: int = 0
    num_failed_blocks: int = 0
    """Whose copy failed, either way; they were computed again."""
    num_refused_blocks: int = 0
    """Whose checksum did not match (audit mode); they were computed again."""
    num_unsaved_blocks: int = 0
    """Evicted from the device tier before the host tier had them."""


@dataclass(frozen=True, slots=True)
class DecisionStatus:
    """What was decided about hits in the host tier and about preemption, since the start."""

    num_loads: int = 0
    """Requests that loaded blocks from the host tier."""
    num_recomputes: int = 0
    """Requests that computed blocks which the host tier held."""
    num_loaded_tokens: int = 0
    num_recomputed_tokens: int = 0
    predicted_load_s: float = 0.0
    """Summed over finished loads."""
    actual_load_s: float = 0.0
    """Summed over the same."""
    num_swap_preemptions: int = 0
    """Requests that lost their place and whose blocks went to the host tier."""
    num_recompute_preemptions: int = 0
    """Requests that lost their place and whose blocks were left to be computed again."""


@dataclass(frozen=True, slots=True)
class CostStatus:
    """What steps and copies cost, as fitted from what was measured; each 0 until then."""

    step_s: float = 0.0
    """Of any step."""
    prefill_token_s: float = 0.0
    """Of one prefilled token, without its context."""
    prefill_context_s: float = 0.0
    """Of one prefilled token and one token that it attends to."""
    decode_row_s: float = 0.0
    """Of one decoding choice."""
    decode_context_s: float = 0.0
    """Of one token that a decoding choice attends to."""
    load_latency_s: float = 0.0
    """Of a copy to the device tier, whatever its size."""
    load_bytes_per_s: float = 0.0
    store_latency_s: float = 0.0
    """Of a copy to the host tier, whatever its size."""
    store_bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """What waits of one tenant in one priority class."""

    priority: Priority
    tenant: str
    """Empty: all callers without an identity."""
    num_requests: int
    num_tokens: int
    """That wait for their prefill."""


@dataclass(frozen=True, slots=True)
class FlushedCache:
    """What a flush made the replicas forget."""

    num_replicas: int
    num_device_blocks: int
    num_host_blocks: int


@dataclass(frozen=True, slots=True)
class DeviceMemoryStatus:
    """A GPU's memory as its allocator sees it, in bytes."""

    total_bytes: int
    allocated_bytes: int
    """Held by weights, cache and the step under way."""
    reserved_bytes: int
    """Taken from the device: what is allocated, and fragments."""
    peak_bytes: int
    """Most that was ever allocated."""


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
    """Prompt tokens taken from the cache, either tier."""
    num_prompt_tokens: int
    num_loading: int = 0
    """Requests whose blocks are on the way from the host tier."""
    host: TierStatus = TierStatus(0, 0, 0, 0)
    """All 0 without a host tier."""
    copies: CopyStatus = CopyStatus()
    decisions: DecisionStatus = DecisionStatus()
    costs: CostStatus = CostStatus()
    queues: tuple[QueueStatus, ...] = ()
    """The largest first, at most 64."""
    address: str = ""
    """Where the gateway finds it."""
    set_aside: str = ""
    """Why the gateway does not use it; empty: it does."""
    tensor_parallel_size: int = 1
    """Ranks that the model is split over."""
    num_streams: int = 0
    """Streams of the gateway that it answers now."""
    num_announced_blocks: int = 0
    """Cached blocks that the gateway's router knows of."""
    num_drafted_tokens: int = 0
    """Drafts (tokens tried before they were drawn), since the start."""
    num_accepted_tokens: int = 0
    """Those of them that were accepted."""
    device_idle_ms_per_step: float = 0.0
    """For which the device had nothing to do before a step although work was there, averaged over
    about the last hundred steps that followed another; 0 where nobody measures it."""
    num_following_steps: int = 0
    """Steps since the start that followed another: something ran on when they were formed."""
    device_memory: DeviceMemoryStatus | None = None
    """The GPU's, of a split model rank 0's; None: there is none."""


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """The whole server; the properties are sums over its replicas."""

    server_version: str
    uptime_s: float
    num_open_requests: int
    replicas: tuple[ReplicaStatus, ...]
    routing_policy: str = ""
    """How the gateway chooses a replica."""
    num_moved_streams: int = 0
    """Streams moved to another replica since the start, whatever the reason."""
    num_waiting_streams: int = 0
    """Streams that wait for a replica now."""

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
