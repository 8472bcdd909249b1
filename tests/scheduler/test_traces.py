"""Random traces through the whole control plane, against answers made one request at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from rillgate_server.core.request import ChoiceStart, RejectReason, Request
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import RowPlan
from tests.support.answers import EOS, reference_answer
from tests.support.engine import Driver, Limits, make_request

POISON = 99
"""A row whose context has this token at position 2 fails once it has as many tokens as the next."""
STEMS = (tuple(range(10, 50)), tuple(range(10, 18)) + tuple(range(60, 90)))
"""Beginnings that prompts share; the two share eight tokens themselves."""
SALTS = (bytes(16), bytes(range(16)))


@dataclass(frozen=True)
class Submit:
    """One arrival."""

    request: Request


@dataclass(frozen=True)
class Abort:
    """An abort of the n-th newest request; of one choice, or of all."""

    age: int
    choice: int | None
    during_step: bool


@dataclass(frozen=True)
class Steps:
    """So many steps without an arrival."""

    count: int


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, ...]:
    """Draw a prompt that often shares its beginning."""
    stem = draw(st.sampled_from(STEMS))
    shared = stem[: draw(st.integers(0, 30))]
    own = draw(st.lists(st.integers(2, 98), min_size=0 if shared else 1, max_size=12))
    return (*shared, *own)


@st.composite
def requests(draw: st.DrawFn, request_id: int) -> Request:
    """Draw a fresh request or a continuation, poisoned now and then."""
    prompt = draw(prompts())
    if len(prompt) > 2 and draw(st.integers(0, 9)) == 0:
        prompt = (*prompt[:2], POISON, *prompt[3:])
    max_tokens = draw(st.integers(1, 20))
    min_tokens = draw(st.integers(0, max_tokens))
    sampling = SamplingParams(
        seed=draw(st.integers(0, 3)),
        temperature=draw(st.sampled_from((0.0, 1.0))),
        min_tokens=min_tokens,
        banned_until_min_tokens=(EOS,),
        num_logprobs=draw(st.sampled_from((None, 0, 2))),
        num_prompt_logprobs=draw(st.sampled_from((None, None, None, 1))),
    )
    indices = range(draw(st.sampled_from((1, 1, 1, 2, 3))))
    fresh = replace(
        make_request(request_id, prompt, max_tokens, [ChoiceStart(i) for i in indices], sampling),
        stop_token_ids=draw(st.sampled_from((frozenset(), frozenset({EOS})))),
        cache_salt=draw(st.sampled_from(SALTS)),
    )
    if draw(st.integers(0, 2)):
        return fresh
    choices = []  # a continuation: each choice has a beginning of its answer, or all of it
    for start in fresh.choices:
        answer, _ = reference_answer(fresh, start)
        choices.append(ChoiceStart(start.index, answer[: draw(st.integers(0, len(answer)))]))
    return replace(fresh, choices=tuple(choices))


@st.composite
def traces(draw: st.DrawFn) -> list[Submit | Abort | Steps]:
    """Draw arrivals with aborts and pauses between them."""
    trace: list[Submit | Abort | Steps] = []
    for request_id in range(draw(st.integers(1, 10))):
        trace.append(Submit(draw(requests(request_id))))
        if draw(st.integers(0, 4)) == 0:
            choice = draw(st.sampled_from((None, None, 0, 1)))
            trace.append(Abort(draw(st.integers(0, 3)), choice, draw(st.booleans())))
        trace.append(Steps(draw(st.sampled_from((0, 0, 1, 2, 7)))))
    return trace


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    """Draw settings so small that every limit is met."""
    max_running = draw(st.integers(1, 5))
    return Limits(
        num_blocks=draw(st.integers(6, 40)),
        block_size_tokens=draw(st.sampled_from((1, 2, 3, 4, 8))),
        max_step_tokens=draw(st.integers(max_running, 24)),
        max_prefill_chunk_tokens=draw(st.integers(1, 12)),
        max_running=max_running,
        max_waiting_requests=draw(st.sampled_from((2, 100))),
        prefix_caching=draw(st.integers(0, 4)) > 0,
    )


def fail_poisoned(row: RowPlan, context: Sequence[int]) -> str | None:
    """Fail a poisoned request's row in mid-answer."""
    is_poisoned = len(context) > 3 and context[2] == POISON and len(context) >= context[3]
    return "NaN logits" if is_poisoned else None


def follow(driver: Driver, trace: Sequence[Submit | Abort | Steps]) -> None:
    """Play a trace, then run until nothing is left."""
    ids: list[int] = []
    for event in trace:
        match event:
            case Submit(request):
                rejection = driver.submit(request)
                if rejection is None:
                    ids.append(request.request_id)
                else:
                    assert rejection.reason in (RejectReason.TOO_LONG, RejectReason.OVERLOADED)
            case Abort(age, choice, during_step) if age < len(ids):
                request_id = ids[-1 - age]
                plan = driver.begin() if during_step else None
                driver.abort(request_id, () if choice is None else (choice,))
                if plan is not None:
                    driver.end(plan)
            case Steps(count):
                for _ in range(count):
                    driver.step()
            case _:
                pass
    driver.run()


@settings(max_examples=250, deadline=None)
@given(limits(), traces())
def test_any_trace_gives_every_request_its_own_answer_and_leaves_no_block_behind(
    limits: Limits, trace: list[Submit | Abort | Steps]
) -> None:
    """Sharing, chunks, preemption, continuation and aborts never change a neighbour's tokens."""
    driver = Driver(limits, fail_rows=fail_poisoned)
    follow(driver, trace)
    driver.check_idle()
    driver.check_answers()
