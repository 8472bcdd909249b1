"""Random traces for the whole control plane: requests, what comes between them, and the machine.

Settings are so small, and prompts share so much, that every limit and every path is met.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from rillgate_server.config.groups import SpeculationConfig
from rillgate_server.core.request import (
    ChoiceStart,
    PriorityClass,
    Request,
    Speculation,
    Tenant,
)
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import RowPlan
from rillgate_server.engine.testing import FakeCopies
from tests.support.answers import EOS, reference_answer
from tests.support.engine import Limits, make_request

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


def random_trace(rng: random.Random, *, may_draft: bool = True) -> list[Event]:
    """Make arrivals with aborts, pauses and mishaps between them."""
    trace: list[Event] = [Submit(random_request(rng, 0))]
    for request_id in range(1, rng.choice((3, 8, 16, 24))):
        trace.append(random_arrival(rng, request_id))
        if rng.random() < 0.3:
            trace.append(random_interruption(rng))
        mishap = rng.random()
        count = rng.choice((0, 1, 2, 7, 20))
        trace.append(Steps(count, mishap < 0.03, 0.03 <= mishap < 0.06))
    return trace if may_draft else [_without_drafts(entry) for entry in trace]


def _without_drafts(entry: Event) -> Event:
    if not isinstance(entry, Submit):
        return entry
    return Submit(replace(entry.request, speculation=Speculation.OFF))


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
            rng.choice(("off", "off", "prompt-lookup", "draft-model", "auto")),
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
