"""The plans whose results are not there yet: their order, their seconds, the device's idle time."""

import pytest

from rillgate_server.core.step import RowPlan, StepPlan, StepResult, StepTimes
from rillgate_server.errors import EngineFailure
from rillgate_server.kvcache.cost_model import StepWork
from rillgate_server.scheduler.open_plans import OpenPlan, OpenPlans
from rillgate_server.scheduler.sequence import RequestGroup, Sequence
from tests.support.engine import make_request


def plan_of(step_id: int, began_s: float = 0.0, *, is_following: bool = True) -> OpenPlan:
    """Make a plan of one row that samples."""
    request = make_request(step_id)
    sequence = Sequence(RequestGroup(request), request.choices[0], (step_id, 0))
    plan = StepPlan(step_id, (), (RowPlan(0, 0, 10),))
    return OpenPlan(plan, (sequence,), (), StepWork(10, 55), began_s, is_following)


def opened(*plans: OpenPlan) -> OpenPlans:
    """Open plans, oldest first."""
    open_plans = OpenPlans(2)
    for plan in plans:
        open_plans.add(plan)
    return open_plans


def result_of(step_id: int) -> StepResult:
    """Make the result of `plan_of`."""
    return StepResult(step_id, ((1,),))


def end(open_plans: OpenPlans, step_id: int, now: float, idle_s: float = 0.0) -> float:
    """Apply the oldest plan's result; return its seconds."""
    assert open_plans.take_oldest(result_of(step_id)).plan.step_id == step_id
    return open_plans.applied(StepTimes(device_idle_s=idle_s), now)


def test_results_come_in_the_order_of_plans() -> None:
    """Another one's is refused, and the right one can still be applied."""
    open_plans = opened(plan_of(1), plan_of(2))
    assert open_plans.is_full
    with pytest.raises(EngineFailure, match="result of step 2 with 1 entries; the open plan is 1"):
        open_plans.take_oldest(result_of(2))
    assert (len(open_plans), open_plans.newest.plan.step_id) == (2, 2)
    end(open_plans, 1, 1.0)
    assert (len(open_plans), open_plans.is_full, open_plans.done_step_id) == (1, False, 1)


def test_seconds_begin_with_the_plan_or_with_the_result_before_it() -> None:
    """Two plans of one moment share no second; a pause belongs to nobody."""
    open_plans = opened(plan_of(1, 10.0), plan_of(2, 10.0))
    assert end(open_plans, 1, 11.0) == 1.0
    assert end(open_plans, 2, 11.5) == 0.5
    open_plans.add(plan_of(3, 20.0))
    assert end(open_plans, 3, 20.25) == 0.25


def test_giving_up_returns_the_plan_under_application_and_those_behind_it() -> None:
    """Whatever raises while a result is applied, its requests are known; no second counts twice."""
    open_plans = opened(plan_of(1), plan_of(2, 3.0))
    open_plans.take_oldest(result_of(1))
    applying, plans = open_plans.take_all(4.0)
    assert applying is not None
    assert [it.plan.step_id for it in (applying, *plans)] == [1, 2]
    assert (len(open_plans), open_plans.done_step_id) == (0, 2)
    assert open_plans.take_all(5.0) == (None, [])
    open_plans.add(plan_of(3, 3.5))
    assert end(open_plans, 3, 4.5) == 0.5


def test_idle_time_is_averaged_over_steps_that_followed() -> None:
    """First the mean of all, then about the last hundred."""
    open_plans = OpenPlans(2)
    open_plans.add(plan_of(1, is_following=False))
    end(open_plans, 1, 1.0, idle_s=9.0)
    assert (open_plans.num_following_steps, open_plans.device_idle_s) == (0, 0.0)
    for step_id, idle_s in ((2, 0.001), (3, 0.002), (4, 0.003)):
        open_plans.add(plan_of(step_id))
        end(open_plans, step_id, float(step_id), idle_s)
    assert open_plans.device_idle_s == pytest.approx(0.002)
    for step_id in range(5, 1005):
        open_plans.add(plan_of(step_id))
        end(open_plans, step_id, float(step_id), 0.004)
    assert open_plans.device_idle_s == pytest.approx(0.004, rel=1e-3)
    assert open_plans.num_following_steps == 1003


def test_a_step_that_only_copies_says_nothing_of_idleness() -> None:
    """It waits for a copy."""
    copying = OpenPlan(StepPlan(1, (), ()), (), (), StepWork(), 0.0, is_following=True)
    open_plans = opened(copying)
    open_plans.take_oldest(StepResult(1, ()))
    open_plans.applied(StepTimes(device_idle_s=1.0), 1.0)
    assert open_plans.num_following_steps == 0
