"""What one run of one contestant gave, real or simulated."""

from dataclasses import dataclass
from statistics import fmean, median

from benchmarks.kv_cache.workload import Users
from rillgate_server.core.load import EngineLoad


@dataclass(frozen=True, slots=True)
class RunResult:
    """The users' view of a run, and the engine's counters at its end."""

    ttfts_s: tuple[float, ...]
    """Times to first token of turns 2 and later."""
    output_tokens_per_s: float
    """Over the whole run, think times included."""
    cached_fraction: float
    """Of the prompt tokens of turns 2 and later."""
    load: EngineLoad

    @classmethod
    def of(cls, users: Users, seconds: float, load: EngineLoad) -> "RunResult":
        """Sum a finished run up."""
        later = [sample for sample in users.samples if sample.turn > 1]
        num_prompt_tokens = sum(sample.num_prompt_tokens for sample in later)
        num_cached_tokens = sum(sample.num_cached_tokens for sample in later)
        return cls(
            tuple(sample.ttft_s for sample in later),
            users.num_output_tokens / seconds,
            num_cached_tokens / num_prompt_tokens,
            load,
        )

    @property
    def median_ttft_s(self) -> float:
        """What a typical later turn waited."""
        return median(self.ttfts_s)

    @property
    def mean_ttft_s(self) -> float:
        """What all later turns waited, divided by their number."""
        return fmean(self.ttfts_s)
