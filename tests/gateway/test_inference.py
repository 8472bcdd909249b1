"""Generate and its neighbours over real gRPC, with an engine whose tokens are known beforehand."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from rillgate_proto.v1 import inference_pb2 as pb
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.engine.testing import FakeModel, fake_logprobs
from tests.gateway.stack import (
    Answer,
    Stack,
    expected_tokens,
    generate,
    read,
    request,
    running_stack,
    served_model,
)

PROMPT = [1, 2, 3]
LENGTH = 40


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    """A server for one test."""
    async with running_stack() as it:
        yield it


def decoded(tokens: list[int]) -> str:
    """Return the text of tokens."""
    return served_model().text.decode(tokens, keep_special_tokens=False)


async def test_generate_streams_the_engines_tokens_and_their_text(stack: Stack) -> None:
    """The stream carries started first, every token once, its text, and the end with usage."""
    answer = await generate(stack, request())
    prompt = served_model().text.encode_prompt("hello")
    tokens = expected_tokens(stack, prompt, 8)
    assert answer.messages[0].HasField("started")
    assert not any(message.HasField("started") for message in answer.messages[1:])
    assert answer.started.num_prompt_tokens == len(prompt)
    assert answer.started.model_version == served_model().spec.version_digest
    assert not answer.started.resumed
    assert answer.token_ids() == tokens
    assert answer.text() == decoded(tokens)
    end = answer.finished()
    assert end.reason == pb.FINISH_REASON_LENGTH
    assert end.usage.completion_tokens == 8
    assert end.usage.prompt_tokens == len(prompt)


async def test_the_first_token_leaves_before_the_second_is_made(stack: Stack) -> None:
    """Nothing waits for company: with one step allowed, one token arrives."""
    stack.pace.hold()
    call = stack.inference.Generate(request(tokens=PROMPT))
    stack.pace.allow(1)
    first = Answer([await call.read()])
    assert first.token_ids() == expected_tokens(stack, PROMPT, 1)
    stack.pace.open()
    rest = await read(call)
    assert first.token_ids() + rest.token_ids() == expected_tokens(stack, PROMPT, 8)
    usage = rest.finished().usage
    assert usage.decode_ms > 0
    assert usage.tokens_per_second == pytest.approx(7000 / usage.decode_ms)


async def test_many_streams_run_at_once_and_none_sees_anothers_tokens(stack: Stack) -> None:
    """Twelve requests in one batch each get their own answer."""
    prompts = [[10 + i, 20 + i, 30] for i in range(12)]
    answers = await asyncio.gather(*(generate(stack, request(tokens=it)) for it in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids() == expected_tokens(stack, prompt, 8)


async def test_a_chat_answers_in_reasoning_text_first(stack: Stack) -> None:
    """The template opens <think>, so the answer begins as reasoning."""
    message = request()
    message.chat.messages.add(role="user", content="hi")
    answer = await generate(stack, message)
    assert answer.reasoning_text()
    assert answer.text() == ""


async def test_choices_share_a_prompt_and_differ_by_their_index(stack: Stack) -> None:
    """With n choices each has its own tokens, text and end; the prompt is computed once."""
    answer = await generate(
        stack, request(tokens=PROMPT, sampling__n=3, sampling__temperature=1, sampling__seed=5)
    )
    model = stack.replica.executor.model
    for choice in range(3):
        context = list(PROMPT)
        for _ in range(8):
            context.append(model.next_token(context, 3, SamplingParams(5, 1.0), choice))
        assert answer.token_ids(choice) == context[3:]
        assert answer.text(choice) == decoded(context[3:])
        assert answer.finished(choice).usage.completion_tokens == 8


async def test_a_seed_is_chosen_and_reported_and_reproduces_the_answer(stack: Stack) -> None:
    """Unset, the seed is random; given back, it gives the same tokens."""
    answers = [
        await generate(stack, request(tokens=PROMPT, sampling__temperature=1)) for _ in range(2)
    ]
    seeds = [answer.started.seed for answer in answers]
    assert seeds[0] != seeds[1]
    again = await generate(
        stack, request(tokens=PROMPT, sampling__temperature=1, sampling__seed=seeds[0])
    )
    assert again.started.seed == seeds[0]
    assert again.token_ids() == answers[0].token_ids() != answers[1].token_ids()


async def test_unset_sampling_takes_the_checkpoints_defaults(stack: Stack) -> None:
    """The bundled model's generation_config.json says greedy; so a bare request is greedy."""
    message = request(tokens=PROMPT)
    message.sampling.ClearField("temperature")
    answer = await generate(stack, message)
    assert answer.token_ids() == expected_tokens(stack, PROMPT, 8)


def ascii_pair(tokens: list[int]) -> int:
    """Return the first place after the fifth where two tokens in a row are printable ASCII."""
    texts = [decoded([token]) for token in tokens]
    return next(
        i
        for i in range(5, len(texts) - 5)
        if all(len(it) == 1 and it.isascii() and it.isprintable() for it in texts[i : i + 2])
    )


async def test_a_stop_string_ends_its_choice_and_never_leaks(stack: Stack) -> None:
    """A match over two tokens is not sent, nor what follows; its tokens count; blocks go back."""
    tokens = expected_tokens(stack, PROMPT, LENGTH)
    place = ascii_pair(tokens)
    stop = decoded(tokens[place : place + 2])
    assert stop not in decoded(tokens[: place + 1])
    answer = await generate(
        stack,
        request(tokens=PROMPT, stopping__max_tokens=LENGTH, stopping__stop_strings=["☃", stop]),
    )
    end = answer.finished()
    assert end.reason == pb.FINISH_REASON_STOP_STRING
    assert end.stop_string == stop
    assert answer.text() == decoded(tokens[:place])
    assert answer.token_ids() == tokens[: place + 2]
    assert end.usage.completion_tokens == place + 2


async def test_a_stop_string_aborts_its_choice_alone(stack: Stack) -> None:
    """The engine hears of the ended choice at once; its sibling goes on to its end."""
    prompt_of = SamplingParams(5, 1.0)
    model, choices = stack.replica.executor.model, []
    for choice in range(2):
        context = list(PROMPT)
        for _ in range(LENGTH):
            context.append(model.next_token(context, 3, prompt_of, choice))
        choices.append(context[3:])
    place = ascii_pair(choices[0])
    stop = decoded(choices[0][place : place + 2])
    assert stop not in decoded(choices[1])
    stack.pace.hold()
    call = asyncio.create_task(
        generate(
            stack,
            request(
                tokens=PROMPT,
                sampling__n=2,
                sampling__temperature=1,
                sampling__seed=5,
                stopping__max_tokens=LENGTH,
                stopping__stop_strings=[stop],
            ),
        )
    )
    stack.pace.allow(place + 3)  # one of them computes the prompt that both share
    await stack.replica.wait_aborted()
    stack.pace.open()
    answer = await call
    assert stack.replica.engine.aborts == [(0,)]
    assert answer.finished(0).reason == pb.FINISH_REASON_STOP_STRING
    assert answer.token_ids(0) == choices[0][: place + 2]
    assert answer.finished(1).reason == pb.FINISH_REASON_LENGTH
    assert answer.token_ids(1) == choices[1]


async def test_a_stop_id_ends_its_choice_without_text(stack: Stack) -> None:
    """The ending token is counted and sent as an id, and gives no text."""
    tokens = expected_tokens(stack, PROMPT, 8)
    answer = await generate(stack, request(tokens=PROMPT, stopping__stop_token_ids=[tokens[5]]))
    first = tokens.index(tokens[5])
    assert answer.token_ids() == tokens[: first + 1]
    assert answer.text() == decoded(tokens[:first])
    assert answer.finished().reason == pb.FINISH_REASON_STOP


async def test_logprobs_come_one_per_token_and_the_prompts_once(stack: Stack) -> None:
    """As many as were asked for, of the tokens that were sent."""
    answer = await generate(
        stack, request(tokens=PROMPT, response__logprobs=2, response__prompt_logprobs=0)
    )
    tokens = answer.token_ids()
    assert [it.token_id for it in answer.logprobs()] == tokens
    for got, token in zip(answer.logprobs(), tokens, strict=True):
        expected = fake_logprobs(token, 2)
        assert got.logprob == pytest.approx(expected.logprob)
        assert [it.token_id for it in got.top] == [token]
    (prompt,) = [m.prompt_logprobs for m in answer.messages if m.prompt_logprobs]
    assert [it.token_id for it in prompt] == PROMPT[1:]
    assert not prompt[0].top


async def test_complete_answers_what_generate_streams(stack: Stack) -> None:
    """One message with the whole of every choice."""
    message = request(
        tokens=PROMPT,
        sampling__n=2,
        sampling__temperature=1,
        sampling__seed=9,
        response__logprobs=1,
        response__prompt_logprobs=1,
    )
    streamed = await generate(stack, message)
    whole = await stack.inference.Complete(pb.CompleteRequest(request=message))
    assert whole.started.seed == 9
    assert [it.token_id for it in whole.prompt_logprobs] == PROMPT[1:]
    assert [choice.index for choice in whole.choices] == [0, 1]
    for choice in whole.choices:
        assert list(choice.token_ids) == streamed.token_ids(choice.index)
        assert choice.text == streamed.text(choice.index)
        assert [it.token_id for it in choice.logprobs] == list(choice.token_ids)
        assert choice.finished.reason == pb.FINISH_REASON_LENGTH


async def test_tokenize_and_detokenize_go_there_and_back(stack: Stack) -> None:
    """Tokenize gives what Generate would feed; Detokenize gives its text."""
    tokenized = await stack.inference.Tokenize(pb.TokenizeRequest(prompt="Grüße, 世界"))
    assert list(tokenized.token_ids) == served_model().text.encode_prompt("Grüße, 世界")
    assert tokenized.max_context_tokens == served_model().spec.max_context_tokens
    text = await stack.inference.Detokenize(pb.DetokenizeRequest(token_ids=tokenized.token_ids))
    assert text.text == "Grüße, 世界"
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
    as_chat = await stack.inference.Tokenize(pb.TokenizeRequest(chat=chat))
    with_tags = await stack.inference.Detokenize(
        pb.DetokenizeRequest(token_ids=as_chat.token_ids, keep_special_tokens=True)
    )
    assert with_tags.text.endswith("hi<｜Assistant｜><think>\n")


async def test_a_text_too_long_for_the_loop_is_encoded_the_same_in_a_thread(stack: Stack) -> None:
    """Tokenize gives the same ids on either path."""
    text = "ab " * 5000
    tokenized = await stack.inference.Tokenize(pb.TokenizeRequest(prompt=text))
    assert list(tokenized.token_ids) == served_model().text.encode_prompt(text)


async def test_list_models_names_the_one_that_is_served(stack: Stack) -> None:
    """Name, version and limits are the checkpoint's; name@version is accepted."""
    (model,) = (await stack.inference.ListModels(pb.ListModelsRequest())).models
    spec = served_model().spec
    assert (model.name, model.version) == (spec.name, spec.version_digest)
    assert model.vocab_size == spec.vocab_size
    assert model.has_chat_template
    answer = await generate(stack, request(model=f"{model.name}@{model.version}"))
    assert answer.finished().usage.completion_tokens == 8


async def test_a_request_id_is_taken_from_the_caller_and_given_back(stack: Stack) -> None:
    """A sane x-request-id names the request everywhere; an insane one is replaced."""
    for given, kept in (("job-17/a", True), ("{bad id}", False), ("x" * 200, False)):
        call: Any = stack.inference.Generate(request(), metadata=(("x-request-id", given),))
        answer = await read(call)
        trailers = dict(await call.trailing_metadata())
        assert trailers["x-request-id"] == answer.started.request_id
        assert (answer.started.request_id == given) is kept


async def test_end_of_sequence_stops_unless_it_is_ignored() -> None:
    """The model's own end gives STOP; with ignore_eos the answer goes on to its length."""
    spec = served_model().spec
    eos = spec.eos_token_ids[0]
    async with running_stack(model=FakeModel(spec.vocab_size, eos, 0.2)) as stack:
        answer = await generate(stack, request(tokens=PROMPT, stopping__max_tokens=LENGTH))
        assert answer.finished().reason == pb.FINISH_REASON_STOP
        assert answer.token_ids()[-1] == eos
        on = await generate(
            stack, request(tokens=PROMPT, stopping__max_tokens=LENGTH, stopping__ignore_eos=True)
        )
        assert on.finished().reason == pb.FINISH_REASON_LENGTH
        assert eos in on.token_ids()
