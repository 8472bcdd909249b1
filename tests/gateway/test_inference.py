"""Generate and its neighbours over real gRPC, with an engine whose tokens are known beforehand."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from rillgate_proto.v1 import inference_pb2 as pb
from tests.gateway.stack import (
    Stack,
    expected_tokens,
    generate,
    request,
    running_stack,
    served_model,
)


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    """A server for one test."""
    async with running_stack() as it:
        yield it


async def test_generate_streams_the_engines_tokens_and_their_text(stack: Stack) -> None:
    """The stream carries started first, every token once, its text, and the end with usage."""
    answer = await generate(stack, request())
    prompt = served_model().text.encode_prompt("hello")
    tokens = expected_tokens(stack, prompt, 8)
    assert answer.messages[0].HasField("started")
    assert answer.started.num_prompt_tokens == len(prompt)
    assert answer.token_ids() == tokens
    assert answer.text() == served_model().text.decode(tokens, keep_special_tokens=False)
    end = answer.finished()
    assert end.reason == pb.FINISH_REASON_LENGTH
    assert end.usage.completion_tokens == 8
    assert end.usage.prompt_tokens == len(prompt)


async def test_many_streams_run_at_once_and_none_sees_anothers_tokens(stack: Stack) -> None:
    """Twelve requests in one batch each get their own answer."""
    prompts = [[10 + i, 20 + i, 30] for i in range(12)]
    answers = await asyncio.gather(*(generate(stack, request(tokens=it)) for it in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids() == expected_tokens(stack, prompt, 8)
