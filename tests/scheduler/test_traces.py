"""Random traces through the whole control plane, against answers made one request at a time.

Half of them have two plans in flight, over a device that is now ahead of the host, now behind.
After every step the driver proves the integrity of pools, index, queue and batch, and at the end
that every block is free or cached. `RILLGATE_TRACES=10000 pytest --timeout 3600 …` plays more
traces than a commit waits for.
"""

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import pytest
from hypothesis import event, given, note, settings
from hypothesis import strategies as st

from rillgate_server.config.groups import SpeculationConfig
from rillgate_server.core.request import (
    ChoiceStart,
    PriorityClass,
    RejectReason,
    Request,
    Speculation,
    Tenant,
)
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import CopyDirection, RowPlan
from rillgate_server.engine.testing import FakeCopies
from tests.support.answers import EOS, reference_answer
from tests.support.drafts import random_draft_model
from tests.support.engine import Driver, Limits, make_request
from tests.support.pipelined import PipelinedDriver

NUM_TRACES = int(os.environ.get("RILLGATE_TRACES", "2000"))
NUM_PARTS = 8
"""Tests that share the traces: each well inside a test's time limit on a slow machine."""
POISON = 99
"""A row whose context has this token at position 2 fails once it has as many tokens as the next."""
STEMS = (
    tuple(range(10, 40)),
    tuple(range(10, 18)) + tuple(range(60, 82)),
    tuple(range(40, 70)),
    tuple(range(89, 59, -1)),
)
"""Beginnings that prompts share; the first two share eight tokens themselves."""
SALTS = (bytes(16), bytes(16), bytes(range(16)))
LENGTHS = (1, 4, 9, 16, 30)
"""Of answers, at most."""
TENANTS = (Tenant(), Tenant("large", 4.0), Tenant("small", 0.5))
MAX_EVENTS = 80
"""Of a trace: more than any has."""
MAX_WAIT_STEPS = 12
"""For the moment of an abort; then it comes anyway."""


class Moment(Enum):
    """When an abort or a flush comes."""

    NOW = "between two steps"
    DURING_STEP = "while a step computes"
    COPY_IN = "while somebody waits for a copy to the device tier"
    COPY_OUT = "while a copy to the host tier is in flight"
    PREEMPTED = "once somebody was preempted"


@dataclass(frozen=True)
class Submit:
    """One arrival."""

    request: Request


@dataclass(frozen=True)
class NextTurn:
    """The n-th newest request again, perhaps with what it has of its answer, and more."""

    age: int
    request_id: int
    keeps_answer: bool
    tail: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class Abort:
    """An abort of the n-th newest request; of one choice, or of all.

    During a copy in: of the first of those that have not started, which is likely to wait for it.
    """

    age: int
    choice: int | None
    moment: Moment


@dataclass(frozen=True)
class Steps:
    """So many steps without an arrival; the first one may be lost, or refused as it begins."""

    count: int
    loses_first: bool = False
    refuses_first: bool = False


@dataclass(frozen=True)
class Flush:
    """The operator empties the cache."""

    moment: Moment


@dataclass(frozen=True)
class Corrupt:
    """Every so manyth host block changes behind everybody's back; only in audit mode."""

    every: int


Event = Submit | NextTurn | Abort | Steps | Flush | Corrupt


def random_prompt(rng: random.Random) -> tuple[int, ...]:
    """Make a prompt that often shares its beginning."""
    shared = rng.choice(STEMS)[: rng.choice((30, 24, 17, 16, 9, 4, 0))]
    own = [rng.randint(2, 98) for _ in range(rng.randint(0 if shared else 1, 12))]
    return (*shared, *own)


def random_request(rng: random.Random, request_id: int) -> Request:
    """Make a fresh request or a continuation, poisoned now and then."""
    prompt = random_prompt(rng)
    if len(prompt) > 2 and rng.random() < 0.1:
        prompt = (*prompt[:2], POISON, *prompt[3:])
    max_tokens = rng.choice(LENGTHS)
    sampling = SamplingParams(
        seed=rng.randint(0, 3),
        temperature=rng.choice((0.0, 1.0)),
        min_tokens=rng.randint(0, max_tokens),
        banned_until_min_tokens=(EOS,),
        num_logprobs=rng.choice((None, 0, 2)),
        num_prompt_logprobs=rng.choice((None,) * 7 + (1,)),
    )
    choices = [ChoiceStart(i) for i in range(rng.choice((1, 1, 1, 2, 3)))]
    fresh = replace(
        make_request(request_id, prompt, max_tokens, choices, sampling),
        stop_token_ids=rng.choice((frozenset(), frozenset({EOS}))),
        cache_salt=rng.choice(SALTS),
        num_shared_prefix_tokens=min(len(prompt), rng.choice((0, 0, 7, 16))),
        tenant=rng.choice(TENANTS),
        priority=rng.choice(tuple(PriorityClass)),
        speculation=rng.choice((None, None, *Speculation)),
    )
    if rng.random() < 0.7:
        return fresh
    continued = []  # each choice has a beginning of its answer, or all of it
    for start in fresh.choices:
        answer, _ = reference_answer(fresh, start)
        continued.append(ChoiceStart(start.index, answer[: rng.randint(0, len(answer))]))
    return replace(fresh, choices=tuple(continued))


def random_arrival(rng: random.Random, request_id: int) -> Submit | NextTurn:
    """Make a request that has nothing to do with others, or the next turn of one."""
    if rng.random() < 0.4:
        return Submit(random_request(rng, request_id))
    return NextTurn(
        rng.randint(0, 8),
        request_id,
        rng.random() < 0.4,
        tuple(rng.randint(2, 98) for _ in range(rng.randint(0, 4))),
        rng.choice(LENGTHS),
    )


def random_interruption(rng: random.Random) -> Event:
    """Make what may come between arrivals."""
    kind, moment = rng.random(), rng.choice((*Moment, Moment.COPY_IN))
    if kind < 0.1:
        return Flush(moment)
    if kind < 0.3:
        return Corrupt(rng.randint(1, 5))
    return Abort(rng.randint(0, 3), rng.choice((None, None, 0, 1)), moment)


def random_trace(rng: random.Random) -> list[Event]:
    """Make arrivals with aborts, pauses and mishaps between them."""
    trace: list[Event] = [Submit(random_request(rng, 0))]
    for request_id in range(1, rng.choice((3, 8, 16, 24))):
        trace.append(random_arrival(rng, request_id))
        if rng.random() < 0.3:
            trace.append(random_interruption(rng))
        mishap = rng.random()
        count = rng.choice((0, 1, 2, 7, 20))
        trace.append(Steps(count, mishap < 0.03, 0.03 <= mishap < 0.06))
    return trace


def random_limits(rng: random.Random) -> Limits:
    """Make settings so small that every limit is met."""
    max_running = rng.randint(1, 6)
    size = rng.choice((1, 2, 3, 4, 8))
    loads_much = rng.random() < 0.5
    return Limits(
        num_blocks=rng.choice((48, 64, 64 if loads_much else 120)) // size,
        block_size_tokens=size,
        max_step_tokens=rng.randint(max_running, 24),
        max_prefill_chunk_tokens=rng.randint(1, 12),
        max_running=max_running,
        max_waiting_requests=rng.choice((3, 100, 100)),
        prefix_caching=loads_much or rng.random() < 0.8,
        num_host_blocks=rng.choice((600, 300) if loads_much else (120, 60, 20, 0)) // size,
        load_policy="load" if loads_much else rng.choice(("load", "auto", "auto", "recompute")),
        audit=rng.random() < 0.5,
        speculation=SpeculationConfig(
            rng.choice(("off", "prompt-lookup", "draft-model", "auto")),
            rng.randint(1, 7),
            "a model",
        ),
        max_plans_in_flight=rng.choice((1, 2)),
    )


def random_copies(rng: random.Random) -> FakeCopies:
    """Say how long copies take, and which blocks do not arrive."""
    steps = [rng.choice((0, 0, 1, 3, 11)) for _ in range(rng.randint(1, 5))]
    failing = rng.choice((0.0, 0.0, 0.1, 0.5))
    return FakeCopies(
        copy_steps=lambda job: steps[job.copy_id % len(steps)],
        fail_copies=lambda job: tuple(i for i in range(len(job.pairs)) if rng.random() < failing),
        seconds_per_block=rng.choice((0.0, 1e-4, 1e-2)),
    )


def fail_poisoned(row: RowPlan, context: Sequence[int]) -> str | None:
    """Fail a poisoned request's row in mid-answer."""
    is_poisoned = len(context) > 3 and context[2] == POISON and len(context) >= context[3]
    return "NaN logits" if is_poisoned else None


class Player:
    """Plays a trace. State: the driver, and the accepted requests, oldest first."""

    def __init__(self, driver: Driver) -> None:
        """Start with nothing accepted."""
        self.driver = driver
        self.ids: list[int] = []

    def play(self, trace: Sequence[Event]) -> None:
        """Play a trace, then run until nothing is left."""
        for entry in trace:
            self._play(entry)
        self.driver.run()

    def _play(self, entry: Event) -> None:
        driver = self.driver
        match entry:
            case Submit(request):
                self._submit(request)
            case NextTurn() if entry.age < len(self.ids):
                self._submit(self._next_turn(entry))
            case Abort(age, choice, moment) if age < len(self.ids):
                self._wait_for(moment)
                self._abort(self._victim(age, moment), choice, moment)
            case Steps(count, loses_first, refuses_first):
                driver.loses_next_step = loses_first
                if isinstance(driver, PipelinedDriver):
                    driver.loses_next_begin = refuses_first
                for _ in range(count):
                    driver.step()
            case Flush(moment):
                self._wait_for(moment)
                driver.flush()
            case Corrupt(every) if driver.limits.audit:
                for block in range(0, driver.limits.num_host_blocks, every):
                    driver.fake.corrupt(block)
            case _:
                pass

    def _submit(self, request: Request) -> None:
        rejection = self.driver.submit(request)
        if rejection is None:
            self.ids.append(request.request_id)
        else:
            assert rejection.reason in (RejectReason.TOO_LONG, RejectReason.OVERLOADED)

    def _next_turn(self, turn: NextTurn) -> Request:
        answer = self.driver.answers.of[self.ids[-1 - turn.age]]
        first = answer.request.choices[0]
        return replace(
            answer.request,
            request_id=turn.request_id,
            prompt_token_ids=(
                *answer.request.prompt_token_ids,
                *(answer.tokens[first.index] if turn.keeps_answer else ()),
                *turn.tail,
            ),
            choices=(ChoiceStart(0),),
            max_tokens=turn.max_tokens,
            sampling=replace(answer.request.sampling, min_tokens=0, num_prompt_logprobs=None),
        )

    def _wait_for(self, moment: Moment) -> None:
        for _ in range(MAX_WAIT_STEPS):
            if not self.driver.scheduler.has_work or self._is_now(moment):
                return
            self.driver.step()

    def _victim(self, age: int, moment: Moment) -> int:
        answers = self.driver.answers
        if moment is Moment.COPY_IN:
            for request_id in self.ids:
                if request_id not in answers.gone and answers.of[request_id].started is None:
                    return request_id
        return self.ids[-1 - age]

    def _abort(self, request_id: int, choice: int | None, moment: Moment) -> None:
        driver = self.driver
        plan = driver.begin() if moment is Moment.DURING_STEP else None
        driver.abort(request_id, () if choice is None else (choice,))
        if plan is not None:
            driver.end(plan)

    def _is_now(self, moment: Moment) -> bool:
        match moment:
            case Moment.COPY_IN:
                return self.driver.scheduler.load(0.0).num_loading > 0
            case Moment.COPY_OUT:
                jobs = self.driver.in_flight.values()
                return any(job.direction is CopyDirection.DEVICE_TO_HOST for job in jobs)
            case Moment.PREEMPTED:
                return self.driver.scheduler.load(0.0).num_preemptions > 0
            case _:
                return True


def make_driver(rng: random.Random, limits: Limits) -> Driver:
    """Build what plays a trace."""
    copies = random_copies(rng)
    if limits.max_plans_in_flight == 1:
        return Driver(limits, fail_rows=fail_poisoned, copies=copies)
    speed = rng.choice((0.0, 0.5, 1.0))
    return PipelinedDriver(
        limits,
        fail_rows=fail_poisoned,
        copies=copies,
        is_device_fast=lambda: rng.random() < speed,
    )


def tell_what_happened(driver: Driver) -> None:
    """Let `pytest --hypothesis-show-statistics` say how much of the traces meets what."""
    load = driver.scheduler.load(driver.clock.now())
    met = {
        "preempted": load.num_preemptions,
        "swapped": load.decisions.num_swap_preemptions,
        "stored": load.copies.num_stored_blocks,
        "loaded": load.copies.num_loaded_blocks,
        "lost copies": load.copies.num_failed_blocks,
        "refused": load.copies.num_refused_blocks,
        "evicted from the host tier": load.host.num_evicted_blocks,
        "drafted": load.num_drafted_tokens,
        "accepted drafts": load.num_accepted_tokens,
    }
    plans = f" ({driver.limits.max_plans_in_flight} plans)"
    for name, count in met.items():
        if count:
            event(name + plans)


@pytest.mark.parametrize("part", range(NUM_PARTS))
@settings(max_examples=NUM_TRACES // NUM_PARTS, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    kept=st.lists(st.integers(0, 99), min_size=MAX_EVENTS, max_size=MAX_EVENTS),
)
def test_any_trace_gives_every_request_its_own_answer_and_leaves_no_block_behind(
    part: int, seed: int, kept: list[int]
) -> None:
    """Sharing, chunks, drafts, swapping, slow and failed copies, aborts: none changes an answer.

    A seed makes the trace, for hypothesis' own draws are too simple, too often, to fill two tiers.
    It takes events out until as few as possible are left that still fail: those at which `kept` is
    not 0 are played.
    """
    rng = random.Random(seed * NUM_PARTS + part)
    limits, trace = random_limits(rng), random_trace(rng)
    driver = make_driver(rng, limits)
    driver.fake.propose = random_draft_model(rng, driver.fake)
    trace = [entry for entry, is_kept in zip(trace, kept, strict=False) if is_kept]
    note(f"{limits}, {trace}")
    Player(driver).play(trace)
    driver.check_idle()
    driver.check_answers()
    driver.flush()
    load = driver.scheduler.load(driver.clock.now())
    assert load.device.num_blocks_free == load.device.num_blocks
    assert load.host.num_blocks_free == load.host.num_blocks
    tell_what_happened(driver)


def test_none_of_this_imports_torch() -> None:
    """The control plane and its fake data plane run where there is no torch at all."""
    script = (
        "import sys, tests.scheduler.test_traces, rillgate_server.engine.engine_loop\n"
        "assert 'rillgate_server.scheduler.scheduler' in sys.modules\n"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, timeout=60, check=False)
    assert done.returncode == 0
