"""What a replica says of itself between steps: counts that routing and operators read.

A snapshot; who sends it and how often is the replica's business.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierLoad:
    """Blocks of one tier: free + used + cached == total."""

    num_blocks: int = 0
    num_blocks_free: int = 0
    num_blocks_used: int = 0
    num_blocks_cached: int = 0


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
    num_waiting: int = 0
    """Choices that wait."""
    num_running_tokens: int = 0
    """Tokens that running choices hold in the cache."""
    num_waiting_tokens: int = 0
    """Tokens that wait for their prefill."""
    device: TierLoad = TierLoad()
    prefill_tokens_per_s: float = 0.0
    """Measured; 0 until then."""
    decode_step_s: float = 0.0
    """Measured; 0 until then."""
    num_preemptions: int = 0
    """Since the start, like the two below."""
    num_cached_tokens: int = 0
    num_prompt_tokens: int = 0
