"""The real scheduler over simulated steps and copies, on a clock that only the simulation moves.

Owns the simulated data plane and the loop that serves users with it. What steps and copies take was
recorded on a real machine (benchmarks.kv_cache.costs). A run of minutes takes a second.
"""

import random
from dataclasses import dataclass, replace

from benchmarks.kv_cache.copies import CopyChannel
from benchmarks.kv_cache.costs import TrueCosts, work_of
from benchmarks.kv_cache.run import RunResult
from benchmarks.kv_cache.scenarios import (
    COST_MODEL,
    LOAD_ALWAYS,
    RECOMPUTE_ALWAYS,
    Contestant,
    Scenario,
)
from benchmarks.kv_cache.workload import FIRST_TOKEN_ID, Users
from rillgate_server.config.groups import BatcherConfig
from rillgate_server.core.clock import VirtualClock
from rillgate_server.core.model_spec import ModelSpec
from rillgate_server.core.step import CopyDirection, StepPlan, StepResult
from rillgate_server.scheduler.scheduler import Scheduler

_COPY_WAIT_S = 0.005
"""A plan without rows waits for a copy no longer than this (engine.executor)."""


class SimulatedExecutor:
    """Answers with random tokens, after the time that a real step would have taken.

    State: the copies under way, and the draws.
    """

    def __init__(
        self, clock: VirtualClock, channel: CopyChannel, costs: TrueCosts, scenario: Scenario
    ) -> None:
        """Move `clock` by what `costs` say; the scenario may slow copies down."""
        self._clock = clock
        self._channel = channel
        self._costs = costs
        slow = scenario.host_speed(costs.prefill_tokens_per_s, costs.block_bytes)
        self._speeds = {
            CopyDirection.HOST_TO_DEVICE: slow or costs.load,
            CopyDirection.DEVICE_TO_HOST: slow or costs.store,
        }
        self._vocab_size = scenario.workload.vocab_size
        self._draw = random.Random(scenario.workload.seed)

    def execute(self, plan: StepPlan) -> StepResult:
        """Let the time of one step pass."""
        for job in plan.copies:
            self._channel.begin(job, self._speeds[job.direction])
        if plan.rows:
            noise = self._draw.choice(self._costs.step_noise)
            self._clock.advance(self._costs.step_s(work_of(plan)) * noise)
        elif self._channel.next_end_s is not None:
            wait_s = self._channel.next_end_s - self._clock.now()
            self._clock.advance(min(max(wait_s, 0.0), _COPY_WAIT_S))
        token_ids = tuple(
            (self._draw.randrange(FIRST_TOKEN_ID, self._vocab_size),)
            for row in plan.rows
            if row.samples
        )
        return StepResult(plan.step_id, token_ids, finished_copies=self._channel.take_finished())


def simulate(
    scenario: Scenario,
    contestant: Contestant,
    costs: TrueCosts,
    seed: int,
    believed_copies_over_true: float = 1.0,
) -> RunResult:
    """Serve a scenario's users once.

    `believed_copies_over_true`: copies are reported to have taken so much more than they did, so
    that the server weighs loading against computing by a wrong cost for the whole run.
    """
    scenario = replace(scenario, workload=replace(scenario.workload, seed=seed))
    workload = scenario.workload
    clock = VirtualClock()
    channel = CopyChannel(clock, costs.block_bytes, believed_copies_over_true)
    executor = SimulatedExecutor(clock, channel, costs, scenario)
    spec = ModelSpec("none", "00" * 32, "", "none", workload.vocab_size, 1 << 20, (), "bfloat16")
    sizes = scenario.cache_sizes(contestant, costs.block_bytes, spec.dtype)
    scheduler = Scheduler(BatcherConfig(), contestant.cache, spec, sizes)
    users = Users(workload, clock.now())
    while not users.is_done:
        for request in users.ask(clock.now()):
            rejection = scheduler.add(request, clock.now())
            assert rejection is None, rejection
        if not scheduler.has_work:
            assert users.next_due_s is not None
            clock.advance(max(0.0, users.next_due_s - clock.now()))
            continue
        plan = scheduler.schedule(clock.now())
        assert plan is not None, scheduler
        output = scheduler.update(executor.execute(plan), clock.now())
        users.hear(output, clock.now())
    return RunResult.of(users, clock.now(), scheduler.load(clock.now()))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mean times to first token on later turns, summed up over several seeds, in seconds."""

    load_s: float
    recompute_s: float
    cost_model_s: float

    @property
    def ratio(self) -> float:
        """The cost model's over the better of the other two."""
        return self.cost_model_s / min(self.load_s, self.recompute_s)


def compare(
    scenario: Scenario,
    costs: TrueCosts,
    seeds: range,
    believed_copies_over_true: float = 1.0,
) -> Comparison:
    """Simulate the three ways to treat a hit in the host tier, for several seeds each."""

    def mean_s(contestant: Contestant) -> float:
        runs = [
            simulate(scenario, contestant, costs, seed, believed_copies_over_true) for seed in seeds
        ]
        return sum(run.mean_ttft_s for run in runs) / len(runs)

    return Comparison(mean_s(LOAD_ALWAYS), mean_s(RECOMPUTE_ALWAYS), mean_s(COST_MODEL))
