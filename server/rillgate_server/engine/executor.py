"""What the engine needs of a data plane: plans in, a result for each out, in their order.

The worker is one, `engine.testing.FakeExecutor` another; neither needs to know that this exists.

    Executor            execute(plan) ─────────────────────────────▶ result
    PipelinedExecutor   begin(plan k), begin(plan k+1), finish() ──▶ result k, begin(plan k+2), …
"""

import time
from collections import deque
from typing import Protocol, runtime_checkable

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


@runtime_checkable
class PipelinedExecutor(Executor, Protocol):
    """Takes the next plan while it computes one. All calls come on the engine's thread.

    `execute` is only called while nothing is begun. A row may hang on the row of its slot before
    it in every way but its positions: where that one failed (FailedRow, NaN logits), this one is
    computed on whatever there is, its result is dropped, and it may be reported failed again.
    """

    @property
    def max_plans_in_flight(self) -> int:
        """How many plans it holds, at least 1."""
        ...

    def begin(self, plan: StepPlan) -> None:
        """Take a plan, and return before it is computed. Its copies begin at once.

        May raise: then nothing of it was begun but its copies, which run and are reported as ever,
        and `finish` gives nothing for it. Its slots count as those of a plan that raised.
        """
        ...

    def finish(self) -> StepResult:
        """Wait for the oldest plan that was begun, and return its result.

        May raise: that plan failed. Those begun after it are still to be finished, though what
        they give is worth nothing but the ends of copies. The next plan that is begun then follows
        a plan that raised.
        """
        ...


class InOrderExecutor:
    """Another executor, one plan at a time: computed while somebody waits for it.

    State: the plans that were begun.
    """

    def __init__(self, executor: Executor) -> None:
        """Let `executor` compute."""
        self._executor = executor
        self._begun: deque[StepPlan] = deque()

    @property
    def max_plans_in_flight(self) -> int:
        """A second plan would only wait (PipelinedExecutor.max_plans_in_flight)."""
        return 1

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step (Executor.execute)."""
        return self._executor.execute(plan)

    def begin(self, plan: StepPlan) -> None:
        """Keep a plan (PipelinedExecutor.begin)."""
        self._begun.append(plan)

    def finish(self) -> StepResult:
        """Compute the oldest plan (PipelinedExecutor.finish)."""
        return self._executor.execute(self._begun.popleft())


class PacedExecutor:
    """Makes steps of another executor last, for debugging: what takes milliseconds can be watched.

    Only steps that compute are stretched; copies between the tiers are not. It has one plan at a
    time, whatever the other can: steps that overlap are not to be watched one by one.
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
