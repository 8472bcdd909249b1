"""Drives a scheduler with two plans in flight over a PipelinedFakeExecutor; and records one.

As tests.support.engine's Driver, but a step begins all plans that may be begun, and ends the oldest
one. How far the device has come meanwhile is the test's choice.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from rillgate_server.core.step import (
    CopyDone,
    RowPlan,
    StepOutput,
    StepPlan,
    StepResult,
    StepTimes,
)
from rillgate_server.engine.testing import FakeCopies, PipelinedFakeExecutor
from tests.support.answers import MODEL
from tests.support.engine import STEP_S, Driver, Limits, StepLost

_INSTANT = FakeCopies()
TWO = Limits(max_plans_in_flight=2)


class PipelinedDriver(Driver):
    """A Driver whose plans overlap."""

    def __init__(
        self,
        limits: Limits,
        *,
        fail_rows: Callable[[RowPlan, Sequence[int]], str | None] | None = None,
        copies: FakeCopies = _INSTANT,
        is_device_fast: Callable[[], bool] = lambda: False,
    ) -> None:
        """Start idle. `is_device_fast` says of each plan that begins whether one more is computed
        before anything else happens; by default each is computed when somebody waits for it."""
        super().__init__(limits, fail_rows=fail_rows, copies=copies)
        self.device = PipelinedFakeExecutor(self.fake)
        self.device.before_begin = self._before_begin
        self.loses_next_begin = False
        """Whether the executor refuses the next plan, once its copies have begun."""
        self._is_device_fast = is_device_fast

    def begin(self) -> StepPlan | None:
        """Form a plan and hand it over; None when none may be, or when it is refused."""
        plan = super().begin()
        if plan is None:
            return None
        if self.device.num_begun:
            assert plan.rows, "copies alone are begun behind a step"
            assert self.plans[-2].rows, "a step is begun behind copies alone"
        try:
            self.device.begin(plan)
        except StepLost as error:
            self._lose(error)
            return None
        if self._is_device_fast():
            self.device.compute()
        return plan

    def end(self, plan: StepPlan | None = None) -> StepOutput:
        """End the oldest plan, whichever is given; one that the executor loses fails all."""
        try:
            result = self.device.finish()
        except StepLost as error:
            return self._lose(error)
        return self.apply(result)

    def step(self) -> StepOutput | None:
        """Begin what may begin, and end the oldest plan; None when there is none."""
        while self.begin() is not None:
            pass
        if not self.device.num_begun:
            self.answers.take(self.scheduler.take_events())
            return None
        return self.end()

    def _lose(self, error: StepLost) -> StepOutput:
        """Drop what was begun, and fail whom it concerns, as the engine does."""
        while self.device.num_begun:
            try:
                result = self.device.finish()
            except Exception:  # it hangs on a step that was lost: whatever it meets
                continue
            self._take_copies(result.finished_copies)
        self.clock.advance(STEP_S)
        return self._took(self.scheduler.fail_plan(str(error), self.clock.now()))

    def _take_copies(self, finished: tuple[CopyDone, ...]) -> None:
        for done in finished:
            del self.in_flight[done.copy_id]
        self.scheduler.copies_done(finished)

    def _before_begin(self, plan: StepPlan) -> None:
        if self.loses_next_begin:
            self.loses_next_begin = False
            raise StepLost(f"step {plan.step_id} is refused")


def begin_two(driver: PipelinedDriver) -> tuple[StepPlan, StepPlan]:
    """Begin two plans."""
    first, second = driver.begin(), driver.begin()
    assert first is not None
    assert second is not None
    return first, second


def rows_of(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    """Return (slot, start, number of tokens) of each row."""
    assert plan is not None
    return [(row.slot, row.start, row.num_tokens) for row in plan.rows]


def num_used(driver: Driver) -> int:
    """Return how many device blocks somebody holds."""
    return driver.scheduler.load(0.0).device.num_blocks_used


class RecordingDevice(PipelinedFakeExecutor):
    """Notes what is called, with the step it is about, and gives its results these times."""

    def __init__(
        self, limits: Limits, before_step: Callable[[StepPlan], None] | None = None
    ) -> None:
        super().__init__(limits.make_executor(MODEL, before_step=before_step))
        self.calls: list[str] = []
        self.times = StepTimes()

    def execute(self, plan: StepPlan) -> StepResult:
        """Note it (PipelinedFakeExecutor.execute)."""
        self.calls.append(f"execute {plan.step_id}")
        return super().execute(plan)

    def begin(self, plan: StepPlan) -> None:
        """Note it (PipelinedFakeExecutor.begin)."""
        self.calls.append(f"begin {plan.step_id}")
        super().begin(plan)

    def finish(self) -> StepResult:
        """Note it where it gives a result (PipelinedFakeExecutor.finish)."""
        if not self.num_begun:
            self.calls.append("finish nothing")
        result = super().finish()
        self.calls.append(f"finish {result.step_id}")
        return replace(result, times=self.times)
