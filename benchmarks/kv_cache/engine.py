"""One contestant on a real model: the engine loop and a worker in this process, no gRPC.

Owns the run, and the slow host tier that a scenario may ask for.
"""

import time
from dataclasses import replace
from queue import Empty, SimpleQueue

from benchmarks.kv_cache.copies import CopyChannel, CopySpeed
from benchmarks.kv_cache.costs import Recording, RecordingExecutor
from benchmarks.kv_cache.run import RunResult
from benchmarks.kv_cache.scenarios import Contestant, Scenario
from benchmarks.kv_cache.workload import Users
from rillgate_server.config.groups import BatcherConfig
from rillgate_server.core.clock import Clock, SystemClock
from rillgate_server.core.step import CopyDone, StepOutput, StepPlan, StepResult
from rillgate_server.engine.engine import Engine
from rillgate_server.engine.engine_loop import EngineEvent, EngineLoop
from rillgate_server.engine.executor import Executor
from rillgate_server.scheduler.scheduler import Scheduler
from rillgate_server.worker.worker import Worker

_COPY_WAIT_S = 0.005
"""A plan without rows waits for a copy no longer than this (engine.executor)."""
_SILENCE_S = 60.0
"""Without any event while somebody waits: the run is broken."""


class ThrottledExecutor:
    """Reports copies as late as a slow host tier would.

    State: the channel that says when each is due, and what the executor reported before that.
    """

    def __init__(self, executor: Executor, clock: Clock, block_bytes: int, speed: CopySpeed):
        """Slow the copies of `executor` down to `speed`."""
        self._executor = executor
        self._clock = clock
        self._speed = speed
        self._channel = CopyChannel(clock, block_bytes)
        self._arrived: dict[int, CopyDone] = {}  # copy id -> report, not due or not told yet
        self._due: list[CopyDone] = []  # the channel's reports that were not told yet

    def execute(self, plan: StepPlan) -> StepResult:
        """Execute one plan."""
        for job in plan.copies:
            self._channel.begin(job, self._speed)
        result = self._executor.execute(plan)
        self._arrived.update((done.copy_id, done) for done in result.finished_copies)
        next_end_s = self._channel.next_end_s
        if not plan.rows and next_end_s is not None:
            time.sleep(min(max(0.0, next_end_s - self._clock.now()), _COPY_WAIT_S))
        self._due += self._channel.take_finished()
        told = [due for due in self._due if due.copy_id in self._arrived]
        self._due = [due for due in self._due if due.copy_id not in self._arrived]
        finished = (replace(self._arrived.pop(due.copy_id), seconds=due.seconds) for due in told)
        return replace(result, finished_copies=tuple(finished))


def run(
    worker: Worker,
    scenario: Scenario,
    contestant: Contestant,
    seed: int,
    host_speed: CopySpeed | None = None,
    recording: Recording | None = None,
) -> RunResult:
    """Serve a scenario's users once, with an empty cache at the start.

    `host_speed` slows copies down; `recording` takes in what steps and copies took.
    """
    clock = SystemClock()
    block_bytes = worker.layout.block_bytes
    sizes = scenario.cache_sizes(contestant, block_bytes, worker.spec.dtype)
    worker.allocate_cache(sizes.num_device_blocks, sizes.num_host_blocks)
    executor: Executor = worker
    if host_speed is not None:
        executor = ThrottledExecutor(executor, clock, block_bytes, host_speed)
    if recording is not None:
        executor = RecordingExecutor(executor, recording)
    scheduler = Scheduler(BatcherConfig(), contestant.cache, worker.spec, sizes)
    events: SimpleQueue[tuple[EngineEvent, float]] = SimpleQueue()
    loop = EngineLoop(
        Engine(scheduler, executor, clock), clock, lambda event: events.put((event, clock.now()))
    )
    begin = clock.now()
    users = Users(replace(scenario.workload, seed=seed), begin)
    loop.start()
    try:
        _serve(users, loop, events, clock)
        seconds = clock.now() - begin
    finally:
        assert loop.stop(_SILENCE_S), loop
    return RunResult.of(users, seconds, loop.load())


def _serve(
    users: Users,
    loop: EngineLoop,
    events: "SimpleQueue[tuple[EngineEvent, float]]",
    clock: Clock,
) -> None:
    """Submit what is due and hand over what is answered, until all users are done."""
    while not users.is_done:
        for request in users.ask(clock.now()):
            loop.submit(request)
        due_s = users.next_due_s
        wait_s = _SILENCE_S if due_s is None else max(0.0, due_s - clock.now())
        try:
            event, now = events.get(timeout=wait_s)
        except Empty:
            assert due_s is not None, f"no event for {_SILENCE_S} s: {loop}"
            continue
        assert isinstance(event, StepOutput), event
        users.hear(event, now)
