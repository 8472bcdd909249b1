"""The executor that makes steps last."""

import time

from rillgate_server.core.step import RowPlan, StepPlan, StepResult
from rillgate_server.engine.executor import PacedExecutor

_FOR_EVER_S = 10_000.0
"""A test that slept this long would be ended by its time limit."""


class QuickExecutor:
    """Computes nothing. Remembers the plans."""

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []

    def execute(self, plan: StepPlan) -> StepResult:
        """Answer at once."""
        self.plans.append(plan)
        return StepResult(plan.step_id, tuple((1,) for _ in plan.rows))


def test_a_step_that_computes_takes_its_least_time() -> None:
    """And is handed on with its result as it is."""
    quick = QuickExecutor()
    plan = StepPlan(1, (), (RowPlan(0, 0, 1),))
    began_s = time.monotonic()
    result = PacedExecutor(quick, 0.05).execute(plan)
    assert time.monotonic() - began_s >= 0.05
    assert (quick.plans, result) == ([plan], StepResult(1, ((1,),)))


def test_a_step_that_only_copies_is_not_held_up() -> None:
    """It has no rows."""
    assert PacedExecutor(QuickExecutor(), _FOR_EVER_S).execute(StepPlan(1, (), ())).step_id == 1
