"""Tenants in competition: the real scheduler on a virtual clock, with steps that cost what they do.

The data plane is a few lines that answer with one token per sampling row: a request ends at its
`max_tokens`. A step takes a fixed time, and some per prefilled token and per decoding row, like a
small model on a GPU. So a minute of service is some thousand steps, and takes a second or two.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from statistics import median, quantiles

import pytest

from rillgate_server.config.groups import BatcherConfig, CacheConfig
from rillgate_server.core.clock import VirtualClock
from rillgate_server.core.model_spec import CacheSizes
from rillgate_server.core.request import PriorityClass, Request, Tenant
from rillgate_server.core.step import StepPlan, StepResult
from rillgate_server.scheduler.fairness import W_INPUT, W_KV_SECOND, W_OUTPUT, service_bound
from rillgate_server.scheduler.scheduler import Scheduler
from tests.support.engine import SPEC, make_request

STEP_S, PREFILL_TOKEN_S, DECODE_ROW_S = 20e-3, 50e-6, 200e-6
MAX_RUNNING = 16
BLOCK_SIZE_TOKENS = 16
NUM_BLOCKS = 1024
"""Enough for all that run: preemption has tests of its own."""
TTFT_SHIFT, TTFT_TAIL_SHIFT = 1.2, 1.5
"""What a flood may do to another tenant's median and 99th percentile."""


@dataclass(slots=True)
class Traffic:
    """One tenant's requests, and what became of them."""

    tenant: Tenant
    num_prompt_tokens: int
    max_tokens: int
    priority: PriorityClass = PriorityClass.NORMAL
    service: float = 0.0
    """What it was served, in the counters' unit, counted here from the plans."""
    num_waiting: int = 0
    """Submitted, and not started."""
    first_tokens_s: list[float] = field(default_factory=list)
    """Times from arrival to the first token, in the order of those."""
    longest_run_s: float = 0.0


class Simulation:
    """A scheduler, a clock, and who asks what of them."""

    def __init__(self, aging_s: float = 30.0) -> None:
        """Start idle."""
        batcher = BatcherConfig(
            max_running=MAX_RUNNING,
            max_step_tokens=1024,
            max_waiting_requests=10_000,
            max_waiting_tokens=1 << 30,
            aging_s=aging_s,
        )
        cache = CacheConfig(block_size_tokens=BLOCK_SIZE_TOKENS)
        sizes = CacheSizes(NUM_BLOCKS, 1024, SPEC.dtype)
        self.clock = VirtualClock()
        self.scheduler = Scheduler(batcher, cache, SPEC, sizes)
        self._ids = count(1)
        self._requests: dict[int, tuple[Request, Traffic]] = {}
        self._started_s: dict[int, float] = {}
        """Request id -> when it started, until it ends."""
        self._num_held: dict[int, int] = {}
        """Request id -> tokens that it holds, likewise."""

    def submit(self, traffic: Traffic) -> None:
        """Add one request, with a prompt that no other shares."""
        request_id, now = next(self._ids), self.clock.now()
        own = (2 + request_id % 97, 2 + request_id // 97 % 97, 2 + request_id // 9409 % 97)
        prompt = own + (2,) * (traffic.num_prompt_tokens - len(own))
        request = replace(
            make_request(request_id, prompt, traffic.max_tokens),
            tenant=traffic.tenant,
            priority=traffic.priority,
            arrival_s=now,
        )
        assert self.scheduler.add(request, now) is None
        self._requests[request_id] = (request, traffic)
        traffic.num_waiting += 1

    def keep_waiting(self, traffic: Traffic, num_requests: int) -> None:
        """Fill up what a tenant has waiting."""
        while traffic.num_waiting < num_requests:
            self.submit(traffic)

    def run(self, seconds: float, before_step: Callable[[], None]) -> None:
        """Step on for so long; `before_step` submits."""
        end_s = self.clock.now() + seconds
        while self.clock.now() < end_s:
            before_step()
            plan = self.scheduler.schedule(self.clock.now())
            if plan is None:
                self.clock.advance(STEP_S)
            else:
                self._step(plan)
        self.scheduler.check_integrity()

    def _step(self, plan: StepPlan) -> None:
        num_prefill = sum(row.num_tokens for row in plan.rows if row.num_tokens > 1)
        num_decode = sum(row.num_tokens == 1 for row in plan.rows)
        seconds = STEP_S + PREFILL_TOKEN_S * num_prefill + DECODE_ROW_S * num_decode
        self.clock.advance(seconds)
        now = self.clock.now()
        num_sampled = sum(row.samples for row in plan.rows)
        output = self.scheduler.update(StepResult(plan.step_id, ((5,),) * num_sampled), now)
        for started in output.started:
            _, traffic = self._requests[started.request_id]
            traffic.num_waiting -= 1
            traffic.service += W_INPUT * (traffic.num_prompt_tokens - started.num_cached_tokens)
            self._started_s[started.request_id] = now - seconds
            self._num_held[started.request_id] = traffic.num_prompt_tokens
        for request_id, num_held in self._num_held.items():
            self._requests[request_id][1].service += W_KV_SECOND * num_held * seconds
        for tokens in output.tokens:
            request, traffic = self._requests[tokens.request_id]
            traffic.service += W_OUTPUT
            self._num_held[tokens.request_id] += 1
            if tokens.token_offset == 0:
                traffic.first_tokens_s.append(now - request.arrival_s)
        for finished in output.finished:
            _, traffic = self._requests.pop(finished.request_id)
            del self._num_held[finished.request_id]
            run_s = now - self._started_s.pop(finished.request_id)
            traffic.longest_run_s = max(traffic.longest_run_s, run_s)


def backlogged(seconds: float, *traffics: Traffic) -> list[float]:
    """Let tenants compete that always have something waiting; return what each was served."""
    simulation = Simulation()

    def submit() -> None:
        for traffic in traffics:
            simulation.keep_waiting(traffic, MAX_RUNNING)

    simulation.run(seconds, submit)
    return [traffic.service for traffic in traffics]


def bound(*traffics: Traffic) -> float:
    """Compute the theorem's bound for these, from what they may hold and how long they ran."""
    return service_bound(
        max(traffic.num_prompt_tokens for traffic in traffics),
        max(MAX_RUNNING * (traffic.num_prompt_tokens + traffic.max_tokens) for traffic in traffics),
        max(traffic.longest_run_s for traffic in traffics),
        min(traffic.tenant.weight for traffic in traffics),
    )


SHAPES = [
    pytest.param((32, 32), (32, 32), id="alike"),
    pytest.param((8, 64), (200, 8), id="long answers against long prompts"),
    pytest.param((16, 8), (240, 200), id="small requests against large ones"),
]


@pytest.mark.parametrize(("first", "second"), SHAPES)
def test_two_backlogged_tenants_are_served_alike(
    first: tuple[int, int], second: tuple[int, int]
) -> None:
    """Over every interval within the theorem's bound, and within 5 % over a minute."""
    traffics = (Traffic(Tenant("a"), *first), Traffic(Tenant("b"), *second))
    simulation = Simulation()
    differences: list[float] = []

    def submit() -> None:
        differences.append(traffics[0].service - traffics[1].service)
        for traffic in traffics:
            simulation.keep_waiting(traffic, MAX_RUNNING)

    simulation.run(60.0, submit)
    assert max(differences) - min(differences) <= bound(*traffics)
    services = [traffic.service for traffic in traffics]
    assert sum(services) > 2 * bound(*traffics), "too short a run to break the bound"
    assert min(services) >= 0.95 * max(services), services


def test_a_tenant_of_twice_the_weight_is_served_twice_as_much() -> None:
    """Within the bound on services over weights, and within 5 % over a minute."""
    heavy, light = Traffic(Tenant("heavy", 2.0), 32, 32), Traffic(Tenant("light", 1.0), 60, 16)
    for_heavy, for_light = backlogged(60.0, heavy, light)
    assert abs(for_heavy / 2 - for_light) <= bound(heavy, light)
    assert for_heavy == pytest.approx(2 * for_light, rel=0.05)


def first_tokens_of_the_other(flood_size: int, *, refills: bool) -> list[float]:
    """Return the times to the first token of a light tenant beside one that floods."""
    simulation = Simulation(aging_s=5.0)  # most of the flood grows older than this
    flood, light = Traffic(Tenant("flood"), 60, 32), Traffic(Tenant("light"), 40, 8)
    simulation.keep_waiting(flood, flood_size)
    next_s = 1.0

    def submit() -> None:
        nonlocal next_s
        if refills:
            simulation.keep_waiting(flood, flood_size)
        if simulation.clock.now() >= next_s:
            simulation.submit(light)
            next_s += 0.217

    simulation.run(40.0, submit)
    assert flood.num_waiting > 0, "the flood must last"
    return light.first_tokens_s


def test_a_flood_hardly_moves_anothers_time_to_the_first_token() -> None:
    """1000 requests at once, against as many as fill the batch: what is queued does not matter."""
    alone = first_tokens_of_the_other(MAX_RUNNING, refills=True)
    flooded = first_tokens_of_the_other(1000, refills=False)
    assert min(len(alone), len(flooded)) > 150
    assert median(flooded) <= TTFT_SHIFT * median(alone)
    assert quantiles(flooded, n=100)[98] <= TTFT_TAIL_SHIFT * quantiles(alone, n=100)[98]


def test_no_tenant_of_a_class_can_starve_another() -> None:
    """Nineteen that always have something waiting, however large; the twentieth gets its share."""
    greedy = [Traffic(Tenant(f"greedy-{i}"), 100 + 5 * i, 40) for i in range(19)]
    small = Traffic(Tenant("small"), 8, 4)
    services = backlogged(60.0, *greedy, small)
    assert small.service >= sum(services) / 20 - bound(*greedy, small)
    assert min(services) >= 0.5 * max(services), services
    assert max(small.first_tokens_s) < 5.0


@pytest.mark.parametrize("aging_s", [1.0, 4.0])
def test_aging_keeps_the_lowest_class_alive(aging_s: float) -> None:
    """Under constant high work it starts one request in each 2 * aging_s, and hardly disturbs."""
    simulation = Simulation(aging_s)
    high = Traffic(Tenant("high"), 32, 16, PriorityClass.HIGH)
    low = Traffic(Tenant("low"), 32, 16, PriorityClass.LOW)

    def submit() -> None:
        simulation.keep_waiting(high, MAX_RUNNING)
        simulation.keep_waiting(low, 5)

    simulation.run(40.0, submit)
    num_turns = 40.0 / (2 * aging_s)
    assert 0.75 * num_turns - 1 <= len(low.first_tokens_s) <= num_turns
    assert high.service > 20 * low.service
