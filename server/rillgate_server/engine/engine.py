"""The step: schedule, execute, update, emit.

Owns the order of the four and nothing else. Does not know threads, queues or callbacks (the
engine loop does), nor what a plan means.
"""

import logging

from rillgate_server.core.clock import Clock
from rillgate_server.core.step import StepOutput
from rillgate_server.engine.executor import Executor
from rillgate_server.errors import EngineFailure
from rillgate_server.scheduler.scheduler import Scheduler

_LOG = logging.getLogger(__name__)


class Engine:
    """A scheduler and an executor, driven step by step on one thread."""

    def __init__(self, scheduler: Scheduler, executor: Executor, clock: Clock) -> None:
        """Take all three; the engine loop calls the scheduler's commands itself."""
        self.scheduler = scheduler
        self._executor = executor
        self._clock = clock

    def __repr__(self) -> str:
        return f"Engine({self.scheduler})"

    def step(self) -> StepOutput | None:
        """Run one step and return what it means for the requests; None when there is nothing to do,
        or nothing but to wait (`Scheduler.seconds_to_wait`).

        Raises whatever the executor raises; `Scheduler.fail_plan` then clears the step away.
        """
        now = self._clock.now()
        plan = self.scheduler.schedule(now)
        if plan is None:
            return self._without_plan(now)
        result = self._executor.execute(plan)
        for copy in result.finished_copies:
            if copy.message:
                _LOG.warning("copy %d between the cache's tiers: %s", copy.copy_id, copy.message)
        return self.scheduler.update(result, self._clock.now())

    def _without_plan(self, now: float) -> StepOutput | None:
        output = self.scheduler.take_events()
        is_waiting = self.scheduler.seconds_to_wait(now) > 0.0
        if output is None and self.scheduler.has_work and not is_waiting:
            raise EngineFailure(f"requests wait and no step can be formed: {self.scheduler}")
        return output
