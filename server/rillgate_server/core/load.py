"""What a replica says of itself between steps: counts that routing and operators read.

A snapshot; who sends it and how often is the replica's business.
"""

from dataclasses import dataclass

from rillgate_server.core.request import PriorityClass

FROZEN_AFTER_S = 5.0
"""Without a finished step, with work to do, however short steps are (contracts, section 2)."""
FROZEN_STEPS = 10.0
"""Predicted steps without a finished one, if that is longer."""
UNMEASURED_FROZEN_AFTER_S = 60.0
"""While no step is predicted: the first ones compile and warm up."""


@dataclass(frozen=True, slots=True)
class TierLoad:
    """Blocks of one tier: free + used + cached + copying == total; and counts since the start."""

    num_blocks: int = 0
    num_blocks_free: int = 0
    num_blocks_used: int = 0
    num_blocks_cached: int = 0
    num_blocks_copying: int = 0
    """Held by a copy alone."""
    num_hit_tokens: int = 0
    """Prompt and replayed tokens that were found in this tier and used."""
    num_evicted_blocks: int = 0
    """Cached blocks that were given up for room."""
    num_blocks_pageable: int = 0
    """In memory that could not be pinned, where a GPU copies from it; whatever they hold."""


@dataclass(frozen=True, slots=True)
class CopyCounts:
    """Copies between the tiers since the start."""

    num_stored_blocks: int = 0
    """Device to host."""
    num_stored_bytes: int = 0
    num_loaded_blocks: int = 0
    """Host to device."""
    num_loaded_bytes: int = 0
    num_failed_blocks: int = 0
    """Whose copy failed, either way, refused ones apart."""
    num_refused_blocks: int = 0
    """Whose checksum did not match (audit mode)."""
    num_unsaved_blocks: int = 0
    """Evicted from the device tier before the host tier had them, while it was on."""


@dataclass(frozen=True, slots=True)
class LoadDecisions:
    """What was decided about hits in the host tier, and what came of it, since the start."""

    num_loads: int = 0
    """Requests that loaded blocks from the host tier."""
    num_recomputes: int = 0
    """Requests that computed blocks which the host tier held, all or some of them."""
    num_loaded_tokens: int = 0
    num_recomputed_tokens: int = 0
    predicted_load_s: float = 0.0
    """Of the copies themselves, summed over the loads that have ended well."""
    actual_load_s: float = 0.0
    """What the same copies took."""
    num_swap_preemptions: int = 0
    """Victims whose blocks went to the host tier."""
    num_recompute_preemptions: int = 0
    """Victims whose blocks were left to be computed again."""


@dataclass(frozen=True, slots=True)
class FittedCosts:
    """What steps and copies cost, as fitted from what was measured; 0 until then."""

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
class FlushedBlocks:
    """Cached blocks that were forgotten on demand."""

    num_device_blocks: int
    num_host_blocks: int


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """What waits of one tenant in one priority class."""

    priority: PriorityClass
    tenant: str
    num_requests: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A GPU's memory, as its allocator sees it, in bytes; all 0 where there is no GPU.

    | weights, cache, tensors of the step | unused | free, or other processes' |
    0                             allocated      reserved                   total
    """

    total_bytes: int = 0
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    """Taken from the device; what lies between is fragments, or was used by a step."""
    peak_bytes: int = 0
    """Most that was ever allocated."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The engine's load after its latest step."""

    step_id: int = 0
    """Steps since the start."""
    step_age_s: float = 0.0
    """Since the last finished step, or since work arrived; 0 without work."""
    is_draining: bool = False
    num_running: int = 0
    """Choices in the running batch."""
    num_loading: int = 0
    """Choices whose blocks are on the way from the host tier."""
    num_waiting: int = 0
    """Choices that wait."""
    num_running_tokens: int = 0
    """Tokens that running choices hold in the cache."""
    num_waiting_tokens: int = 0
    """Tokens that wait for their prefill."""
    device: TierLoad = TierLoad()
    host: TierLoad = TierLoad()
    copies: CopyCounts = CopyCounts()
    decisions: LoadDecisions = LoadDecisions()
    costs: FittedCosts = FittedCosts()
    queues: tuple[QueueLoad, ...] = ()
    """The largest first, at most MAX_QUEUE_LOADS; the rest is not named."""
    prefill_tokens_per_s: float = 0.0
    """Measured; 0 until then."""
    decode_step_s: float = 0.0
    """Measured; 0 until then."""
    num_preemptions: int = 0
    """Since the start, like the two below."""
    num_cached_tokens: int = 0
    num_prompt_tokens: int = 0
    num_drafted_tokens: int = 0
    """Tokens that steps tried before they were drawn."""
    num_accepted_tokens: int = 0
    """Those of them that were drawn."""
    free_cpu_fraction: float = 1.0
    """Share of the machine's processor time that was idle lately, 0 to 1."""
    free_device_fraction: float = 1.0
    """Share of the device tier's blocks that no request uses, 0 to 1."""
    longest_step_s: float = 0.0
    """The longest step that the fitted costs predict; 0 until measured."""
    device_idle_s_per_step: float = 0.0
    """For which the device had nothing to do before a step although work was there, averaged over
    about the last hundred steps that followed another; 0 where nobody measures it."""
    num_following_steps: int = 0
    """Steps since the start that followed another: something ran on when they were formed."""
    device_memory: DeviceMemory = DeviceMemory()

    @property
    def frozen_after_s(self) -> float:
        """Age of a step from which on the engine counts as frozen."""
        if self.longest_step_s == 0.0:
            return UNMEASURED_FROZEN_AFTER_S
        return max(FROZEN_AFTER_S, FROZEN_STEPS * self.longest_step_s)

    @property
    def is_frozen(self) -> bool:
        """Whether the engine makes no progress though it has work."""
        return self.step_age_s > self.frozen_after_s  # 0 without work


MAX_QUEUE_LOADS = 64
"""Tenants and classes that one load names: a Load leaves five times a second."""
