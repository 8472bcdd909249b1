"""A continuation at any cut emits exactly what follows: E(all) minus E(given)."""

from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from rillgate_proto.v1 import inference_pb2 as pb
from rillgate_server.engine.testing import FakeModel
from rillgate_server.gateway.text.assembler import TextAssembler
from tests.gateway.stack import Answer, Stack, generate, request, running_stack, served_model

LENGTH = 24
EOS = served_model().spec.eos_token_ids[0]
# A byte-level vocabulary drawn at random: half characters and U+FFFD are everywhere in the text.
MODEL = FakeModel(served_model().spec.vocab_size, EOS, 0.02)


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    """A server for one test."""
    async with running_stack(model=MODEL) as it:
        yield it


def base_request(**fields: object) -> pb.GenerateRequest:
    """Build the request that all cuts share: sampled, two choices, logprobs."""
    defaults: dict[str, object] = {
        "sampling__temperature": 1,
        "sampling__n": 2,
        "stopping__max_tokens": LENGTH,
        "response__logprobs": 1,
    }
    return request(tokens=[1, 2, 3], **(defaults | fields))


def continued(
    message: pb.GenerateRequest, started: pb.Started, given: Mapping[int, Sequence[int]]
) -> pb.GenerateRequest:
    """Build the request that goes on from these tokens."""
    again = pb.GenerateRequest()
    again.CopyFrom(message)
    again.continuation.request_id = started.request_id
    again.continuation.model_version = started.model_version
    again.continuation.seed = started.seed
    again.continuation.prompt_digest = started.prompt_digest
    again.continuation.template_time_ms = started.template_time_ms
    for index, token_ids in given.items():
        again.continuation.choices.add(index=index, token_ids=token_ids)
    return again


def text_of(message: pb.GenerateRequest, token_ids: Sequence[int]) -> tuple[str, str]:
    """Return E(ids): the text and the reasoning that a caller has after these ids."""
    assembler = TextAssembler(
        served_model().text, list(message.token_ids.ids), list(message.stopping.stop_strings)
    )
    delta = assembler.push(list(token_ids))
    return delta.text, delta.reasoning_text


def check_follows(
    message: pb.GenerateRequest, whole: Answer, rest: Answer, given: Mapping[int, Sequence[int]]
) -> None:
    """Check that given and rest together are the whole: ids, text, logprobs, end and usage."""
    for choice in range(message.sampling.n):
        ids = list(given.get(choice, ()))
        text, reasoning = text_of(message, ids)
        assert ids + rest.token_ids(choice) == whole.token_ids(choice)
        assert text + rest.text(choice) == whole.text(choice)
        assert reasoning + rest.reasoning_text(choice) == whole.reasoning_text(choice)
        assert rest.logprobs(choice) == whole.logprobs(choice)[len(ids) :]
        if rest.outputs(choice):
            assert rest.outputs(choice)[0].token_offset == len(ids)
        ours, theirs = rest.finished(choice), whole.finished(choice)
        assert (ours.reason, ours.stop_string) == (theirs.reason, theirs.stop_string)
        assert ours.usage.completion_tokens == theirs.usage.completion_tokens
    assert rest.started.resumed
    assert rest.started.seed == whole.started.seed
    assert rest.started.prompt_digest == whole.started.prompt_digest


@pytest.mark.parametrize("seed", [1, 2])
async def test_every_cut_gives_the_same_answer(stack: Stack, seed: int) -> None:
    """Both choices cut at each pair of places, the last cut after the end."""
    message = base_request(sampling__seed=seed)
    whole = await generate(stack, message)
    for cut in range(LENGTH + 1):
        given = {0: whole.token_ids(0)[:cut], 1: whole.token_ids(1)[: (cut * 7) % (LENGTH + 1)]}
        rest = await generate(stack, continued(message, whole.started, given))
        check_follows(message, whole, rest, given)


async def test_every_cut_of_an_answer_that_a_stop_string_ends_gives_the_same(stack: Stack) -> None:
    """Also where the cut lies inside the stop string, whose beginning was withheld."""
    plain = await generate(stack, base_request(sampling__seed=3, sampling__n=1))
    text = plain.text()
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    message = base_request(sampling__seed=3, sampling__n=1, stopping__stop_strings=[stop])
    whole = await generate(stack, message)
    assert whole.finished().reason == pb.FINISH_REASON_STOP_STRING
    assert 0 < len(whole.token_ids()) < len(plain.token_ids())
    for cut in range(len(whole.token_ids()) + 1):
        given = {0: whole.token_ids()[:cut]}
        rest = await generate(stack, continued(message, whole.started, given))
        check_follows(message, whole, rest, given)


async def test_an_answer_resumed_again_and_again_is_the_same(stack: Stack) -> None:
    """Each resumption adds some tokens; all of them together are the whole."""
    message = base_request(sampling__seed=4, sampling__n=1)
    whole = await generate(stack, message)
    tokens = whole.token_ids()
    text, started = text_of(message, [])[0], whole.started
    for begin, end in ((0, 3), (3, 4), (4, 11), (11, len(tokens))):
        rest = await generate(stack, continued(message, started, {0: tokens[:begin]}))
        assert rest.token_ids() == tokens[begin:]
        started = rest.started
        text += text_of(message, tokens[:end])[0][len(text_of(message, tokens[:begin])[0]) :]
    last = await generate(stack, continued(message, started, {0: tokens}))
    assert text + last.text() == whole.text()


async def test_given_tokens_that_end_their_choice_need_no_replica(stack: Stack) -> None:
    """Its finished comes at once, with the reason that it had; nothing is submitted."""
    message = base_request(sampling__seed=5)
    whole = await generate(stack, message)
    given = {0: whole.token_ids(0), 1: whole.token_ids(1)}
    await stack.replica.wait_idle()
    num_steps = stack.replica.executor.num_steps
    await stack.replica.crash()
    rest = await generate(stack, continued(message, whole.started, given))
    check_follows(message, whole, rest, given)
    assert stack.replica.executor.num_steps == num_steps


async def test_end_of_sequence_in_given_tokens_ends_their_choice(stack: Stack) -> None:
    """Given up to the end of sequence, the reason is STOP as it was; ignored, it goes on."""
    message = base_request(sampling__n=1, stopping__max_tokens=300)
    seed = 0
    while (whole := await generate(stack, message)).finished().reason != pb.FINISH_REASON_STOP:
        message.sampling.seed = seed = seed + 1
    given = {0: whole.token_ids()}
    assert given[0][-1] == EOS
    rest = await generate(stack, continued(message, whole.started, given))
    check_follows(message, whole, rest, given)
    message.stopping.ignore_eos = True
    on = await generate(stack, continued(message, whole.started, given))
    assert on.token_ids()


async def test_a_finished_choice_is_not_made_again(stack: Stack) -> None:
    """Its end comes again with the reason given, without text; its sibling is made whole."""
    message = base_request(sampling__seed=6)
    whole = await generate(stack, message)
    again = continued(message, whole.started, {0: whole.token_ids(0)[:5]})
    again.continuation.choices[0].finish_reason = pb.FINISH_REASON_DEADLINE
    rest = await generate(stack, again)
    assert rest.finished(0).reason == pb.FINISH_REASON_DEADLINE
    assert rest.finished(0).usage.completion_tokens == 5
    assert not rest.outputs(0)
    assert rest.token_ids(1) == whole.token_ids(1)


async def test_a_chat_that_breaks_inside_its_reasoning_goes_on_in_it(stack: Stack) -> None:
    """Whether the text is reasoning is known from the prompt and the given tokens alone."""
    message = base_request(sampling__seed=7, sampling__n=1)
    message.chat.messages.add(role="user", content="hi")
    whole = await generate(stack, message)
    for cut in (0, 1, 9, LENGTH):
        given = whole.token_ids()[:cut]
        rest = await generate(stack, continued(message, whole.started, {0: given}))
        assert given + rest.token_ids() == whole.token_ids()
        assert whole.reasoning_text().endswith(rest.reasoning_text())
        assert whole.text().endswith(rest.text())


async def test_prompt_logprobs_are_sent_once(stack: Stack) -> None:
    """A continuation with tokens has had them; one without has not."""
    message = base_request(sampling__seed=8, response__prompt_logprobs=1)
    whole = await generate(stack, message)
    fresh = await generate(stack, continued(message, whole.started, {}))
    later = await generate(stack, continued(message, whole.started, {0: whole.token_ids(0)[:1]}))
    assert [len([m for m in it.messages if m.prompt_logprobs]) for it in (whole, fresh, later)] == [
        1,
        1,
        0,
    ]
