"""What carries out a worker's plans, as the worker sees it."""

from typing import Protocol

from rillgate_server.core.step import StepPlan, StepResult
from rillgate_server.core.step_codec import SampledTokens


class Runner(Protocol):
    """Carries out plans, in order, on one thread."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Carry out one plan. Raises EngineFailure for one that contradicts the slots."""
        ...

    def note_sampled(self, sampled: SampledTokens) -> None:
        """Note tokens that another rank sampled after this one's last plan."""
        ...

    def close(self) -> None:
        """End the copies between the tiers."""
        ...


class PipelinedRunner(Runner, Protocol):
    """One that takes a plan while another is under way."""

    def begin(self, plan: StepPlan) -> None:
        """Hand one plan over."""
        ...

    def finish(self) -> StepResult:
        """Wait for the plan that was handed over first."""
        ...
