"""What the engine needs of a data plane: one plan in, one result out.

The worker is one, `engine.testing.FakeExecutor` another; neither needs to know that this exists.
"""

import time
from typing import Protocol

from rillgate_server.core.step import StepPlan, StepResult


class Executor(Protocol):
    """Computes steps, in order, on the engine's thread."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step. May raise: the plan's requests then fail, and the next plan follows.

        After a plan that raised, the next one ends the slots that it started or ended once more,
        so ending a slot that is not held must be taken well. RankLost is the exception: nothing
        follows it, the engine gives up and fails nobody.
        """
        ...


class PacedExecutor:
    """Makes steps of another executor last, for debugging: what takes milliseconds can be watched.

    Only steps that compute are stretched; copies between the tiers are not.
    """

    def __init__(self, executor: Executor, min_step_s: float) -> None:
        """Let `executor` compute, and each step take at least `min_step_s`."""
        self._executor = executor
        self._min_step_s = min_step_s

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step (Executor.execute)."""
        began_s = time.monotonic()
        result = self._executor.execute(plan)
        if plan.rows:
            time.sleep(max(0.0, began_s + self._min_step_s - time.monotonic()))
        return result
