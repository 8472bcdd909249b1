"""The step: schedule, begin, finish, update, emit.

Owns the order of these and how many plans are begun, and nothing else. Does not know threads,
queues or callbacks (the engine loop does), nor what a plan means.

    one plan in flight    schedule k, begin k │ device: k │ finish k, update k, schedule k+1, …
    two                   device:   k         │ k+1            │ k+2
                          host:     begin k+1 │ update k, schedule and begin k+2 │ update k+1, …
"""

import logging

from rillgate_server.core.clock import Clock
from rillgate_server.core.step import CopyDone, StepOutput
from rillgate_server.engine.executor import Executor, InOrderExecutor, PipelinedExecutor
from rillgate_server.errors import EngineFailure, RankLost
from rillgate_server.scheduler.scheduler import Scheduler

_LOG = logging.getLogger(__name__)


class Engine:
    """A scheduler and an executor, driven step by step on one thread.

    State: how many plans the executor has begun and not finished.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, clock: Clock) -> None:
        """Take all three; the engine loop calls the scheduler's commands itself.

        As many plans are in flight as both the configuration and the executor allow.
        """
        self.scheduler = scheduler
        self._executor = _pipelined(executor, scheduler.max_plans_in_flight)
        self._max_begun = min(scheduler.max_plans_in_flight, self._executor.max_plans_in_flight)
        self._num_begun = 0
        self._clock = clock

    def __repr__(self) -> str:
        return f"Engine(begun={self._num_begun} of {self._max_begun}, {self.scheduler})"

    def step(self) -> StepOutput | None:
        """Run one step and return what it means for the requests; None when there is nothing to do,
        or nothing but to wait (`Scheduler.seconds_to_wait`).

        Steps behind it may have begun: then the next call goes on from there. Raises whatever the
        executor raises; `fail_step` then clears away what was begun.
        """
        now = self._clock.now()
        self._begin_plans(now)
        if not self._num_begun:
            return self._without_plan(now)
        self._num_begun -= 1  # first: a plan that raises is finished, too
        result = self._executor.finish()
        _log_failed_copies(result.finished_copies)
        return self.scheduler.update(result, self._clock.now())

    def _begin_plans(self, now: float) -> None:
        while self._num_begun < self._max_begun:
            plan = self.scheduler.schedule(now)
            if plan is None:
                return
            self._executor.begin(plan)
            self._num_begun += 1

    def _without_plan(self, now: float) -> StepOutput | None:
        output = self.scheduler.take_events()
        is_waiting = self.scheduler.seconds_to_wait(now) > 0.0
        if output is None and self.scheduler.has_work and not is_waiting:
            raise EngineFailure(f"requests wait and no step can be formed: {self.scheduler}")
        return output

    def fail_step(self, message: str) -> StepOutput:
        """End the requests of the step that raised, and of those begun behind it."""
        self.drop_begun()
        return self.scheduler.fail_plan(message, self._clock.now())

    def drop_begun(self) -> None:
        """Wait for all that was begun and apply nothing of it but the ends of copies.

        The scheduler's plans stay open: `Scheduler.fail_plan` or `fail_all` is to follow.
        """
        while self._num_begun:
            self._num_begun -= 1
            try:
                result = self._executor.finish()
            except RankLost:
                raise
            except Exception as error:  # the border of the step: its fault follows another
                _LOG.warning("a step behind one that is dropped failed: %s", type(error).__name__)
            else:
                _log_failed_copies(result.finished_copies)
                self.scheduler.copies_done(result.finished_copies)


def _pipelined(executor: Executor, max_plans: int) -> PipelinedExecutor:
    """Return the executor with `begin` and `finish`: its own where it may hold a second plan."""
    if isinstance(executor, PipelinedExecutor) and min(max_plans, executor.max_plans_in_flight) > 1:
        return executor
    return InOrderExecutor(executor)


def _log_failed_copies(copies: tuple[CopyDone, ...]) -> None:
    for copy in copies:
        if copy.message:
            _LOG.warning("copy %d between the cache's tiers: %s", copy.copy_id, copy.message)
