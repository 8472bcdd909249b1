"""What the engine needs of a data plane: one plan in, one result out.

The worker is one, `engine.testing.FakeExecutor` another; neither needs to know that this exists.
"""

from typing import Protocol

from rillgate_server.core.step import StepPlan, StepResult


class Executor(Protocol):
    """Computes steps, in order, on the engine's thread."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step. May raise: the plan's requests then fail, and the next plan follows.

        After a plan that raised, the next one ends the slots that it started or ended once more,
        so ending a slot that is not held must be taken well.
        """
        ...
