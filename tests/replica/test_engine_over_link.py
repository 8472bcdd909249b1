"""Link, socket, service, engine loop and scheduler together, over a fake executor.

The fake's tokens are a hash of their context, so every answer can be said beforehand.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

import pytest

from rillgate_server.core.pending_output import StepEntry
from rillgate_server.core.request import ChoiceStart, FinishReason, RejectReason
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import ChoiceFinished, ChoiceTokens, PromptLogprobs, RequestStarted
from rillgate_server.core.submission import Submission
from rillgate_server.engine.testing import FakeModel
from rillgate_server.gateway.replica_link import ReplicaLink
from rillgate_server.gateway.replica_stream import RequestRefused
from tests.gateway.stack import Replica, running_replica, served_model
from tests.replica.engine_server import DEADLINE_S, make_submission, next_events, read_all

VOCAB_SIZE = served_model().spec.vocab_size
MODEL = FakeModel(VOCAB_SIZE)

REFUSED = make_submission(request_id="x" * 1000)
"""Answered at the door."""

Setup = tuple[Replica, ReplicaLink]
T = TypeVar("T")


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    """Yield a replica with a fake executor, and a link that is connected to it."""
    async with running_replica(MODEL) as replica:
        link = ReplicaLink(f"unix:{replica.socket}")
        await link.start()
        try:
            await link.wait_ready(DEADLINE_S)
            yield replica, link
        finally:
            replica.pace.open()
            await link.close()


def expected(submission: Submission, choice: int) -> list[int]:
    """Say what the fake answers."""
    prompt = submission.prompt_token_ids
    context = list(prompt)
    for _ in range(submission.max_tokens):
        context.append(MODEL.next_token(context, len(prompt), submission.sampling, choice))
    return context[len(prompt) :]


def of_type(events: Sequence[StepEntry], kind: type[T]) -> list[T]:
    """Pick the events of one kind."""
    return [event for event in events if isinstance(event, kind)]


def tokens_of(events: Sequence[StepEntry], choice: int, start: int = 0) -> list[int]:
    """Join a choice's tokens; the offsets must leave no gap."""
    joined: list[int] = []
    for entry in of_type(events, ChoiceTokens):
        if entry.choice_index == choice:
            assert entry.token_offset == start + len(joined)
            joined.extend(entry.token_ids)
    return joined


async def test_many_requests_get_their_own_answers(setup: Setup) -> None:
    """Twenty at once, of different lengths: started first, every token once, the end last."""
    _, link = setup
    submissions = [
        make_submission(*range(1, 3 + 5 * i), max_tokens=1 + 3 * i, ignore_eos=True)
        for i in range(20)
    ]
    streams = [link.submit(submission) for submission in submissions]
    for stream, submission in zip(streams, submissions, strict=True):
        events = await read_all(stream)
        assert isinstance(events[0], RequestStarted)
        assert tokens_of(events, 0) == expected(submission, 0)
        assert of_type(events, ChoiceFinished) == [
            ChoiceFinished(stream.request_key, 0, FinishReason.LENGTH, submission.max_tokens)
        ]
        assert events[-1] == of_type(events, ChoiceFinished)[0]


async def test_choices_are_told_apart_by_their_index(setup: Setup) -> None:
    """Four choices of one prompt: each has its own draws and its own end."""
    _, link = setup
    choices = tuple(map(ChoiceStart, (0, 1, 2, 5)))
    submission = make_submission(1, 2, 3, choices=choices, max_tokens=12, ignore_eos=True)
    events = await read_all(link.submit(submission))
    answers = {choice.index: tokens_of(events, choice.index) for choice in choices}
    assert answers == {choice.index: expected(submission, choice.index) for choice in choices}
    assert len({tuple(answer) for answer in answers.values()}) == 4
    assert {end.choice_index for end in of_type(events, ChoiceFinished)} == {0, 1, 2, 5}


async def test_a_continuation_sends_only_what_is_new(setup: Setup) -> None:
    """Five given tokens of twelve: seven come, with offsets from the original start."""
    _, link = setup
    whole = make_submission(1, 2, 3, max_tokens=12, ignore_eos=True)
    answer = expected(whole, 0)
    given = make_submission(
        1, 2, 3, max_tokens=12, ignore_eos=True, choices=(ChoiceStart(0, tuple(answer[:5])),)
    )
    events = await read_all(link.submit(given))
    assert tokens_of(events, 0, start=5) == answer[5:]
    assert of_type(events, ChoiceFinished)[0].num_tokens == 12


async def test_log_probabilities_arrive_with_their_tokens(setup: Setup) -> None:
    """One per generated token; the prompt's once, from its second token on."""
    _, link = setup
    sampling = SamplingParams(seed=3, num_logprobs=1, num_prompt_logprobs=0)
    submission = make_submission(*range(40), sampling=sampling, max_tokens=5, ignore_eos=True)
    events = await read_all(link.submit(submission))
    logprobs = [it for entry in of_type(events, ChoiceTokens) for it in entry.logprobs]
    assert [it.token_id for it in logprobs] == expected(submission, 0)
    (prompt,) = of_type(events, PromptLogprobs)
    assert [it.token_id for it in prompt.positions] == list(range(1, 40))


async def test_what_the_scheduler_refuses_comes_back_with_its_numbers(setup: Setup) -> None:
    """Too long for the context: TOO_LONG says what was asked for and the limit."""
    _, link = setup
    limit = served_model().spec.max_context_tokens
    with pytest.raises(RequestRefused) as caught:
        await read_all(link.submit(make_submission(1, 2, max_tokens=limit)))
    rejection = caught.value.rejection
    assert rejection.reason is RejectReason.TOO_LONG
    assert (rejection.asked, rejection.limit) == (limit + 2, limit)


async def test_an_abort_frees_the_blocks_within_one_step(setup: Setup) -> None:
    """With three choices running, one more step after the abort leaves no block in use."""
    replica, link = setup
    replica.pace.hold()
    choices = tuple(map(ChoiceStart, range(3)))
    stream = link.submit(make_submission(*range(30), choices=choices, max_tokens=100))
    replica.pace.allow(3)
    await next_events(stream)
    stream.abort()
    await replica.wait_aborted()
    replica.pace.allow(1)  # the step under way, which waits for leave
    await replica.wait_idle()
    assert replica.num_blocks_used == 0
    assert not await next_events(stream)


async def test_an_abort_of_one_choice_leaves_the_others_their_tokens(setup: Setup) -> None:
    """Choice 1 of three ends early; nothing more comes for it, all for the others."""
    replica, link = setup
    replica.pace.hold()
    choices = tuple(map(ChoiceStart, range(3)))
    submission = make_submission(1, 2, choices=choices, max_tokens=6, ignore_eos=True)
    stream = link.submit(submission)
    replica.pace.allow(2)
    first = await next_events(stream)
    stream.abort((1,))
    await replica.wait_aborted()
    replica.pace.open()
    later = await read_all(stream)
    assert tokens_of([*first, *later], 0) == expected(submission, 0)
    assert tokens_of([*first, *later], 2) == expected(submission, 2)
    assert not [it for it in of_type(later, ChoiceTokens) if it.choice_index == 1]
    assert {it.choice_index for it in of_type(later, ChoiceFinished)} == {0, 2}


async def test_a_broken_run_ends_its_requests_and_no_others(setup: Setup) -> None:
    """One of two gateways goes away: its blocks are free, the other's stream is whole."""
    replica, staying = setup
    leaving = ReplicaLink(f"unix:{replica.socket}")
    await leaving.start()
    await leaving.wait_ready(DEADLINE_S)
    replica.pace.hold()
    submission = make_submission(5, 6, max_tokens=30, ignore_eos=True)
    kept = staying.submit(submission)
    lost = [leaving.submit(make_submission(*range(50), max_tokens=1000)) for _ in range(3)]
    with pytest.raises(RequestRefused):  # so those before it are with the engine
        await read_all(leaving.submit(REFUSED))
    replica.pace.allow(8)  # at most 64 tokens a step
    await next_events(lost[-1])
    await leaving.close()
    await replica.wait_aborted()
    replica.pace.open()
    events = await read_all(kept)
    assert tokens_of(events, 0) == expected(submission, 0)
    await replica.wait_idle()
    assert replica.num_blocks_used == 0


async def test_a_reader_that_gives_up_mid_wait_leaves_nothing_behind(setup: Setup) -> None:
    """Cancelling next_events and closing aborts the request; the link goes on."""
    replica, link = setup
    replica.pace.hold()
    stream = link.submit(make_submission(1, 2, max_tokens=50))
    reader = asyncio.create_task(next_events(stream))
    replica.pace.allow(1)
    await reader
    reader = asyncio.create_task(next_events(stream))
    await asyncio.sleep(0)  # it waits now
    reader.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reader
    stream.close()
    await replica.wait_aborted()
    replica.pace.open()
    await replica.wait_idle()
    assert replica.num_blocks_used == 0
    submission = make_submission(1, 2, ignore_eos=True)
    assert tokens_of(await read_all(link.submit(submission)), 0) == expected(submission, 0)
