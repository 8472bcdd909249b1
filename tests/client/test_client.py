"""Both clients against the fake server, over real gRPC."""

import asyncio
import inspect
import threading
import time

import pytest

from rillgate import AsyncClient, Client, ClientConfig
from rillgate.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ProtocolError,
    ServerFailureError,
    UnavailableError,
)
from rillgate.testing import FakeError, FakeReply, FakeServer
from rillgate.types import ChatMessage, Chunk, FinishReason
from tests.client.silent_proxy import SilentProxy

_REPLY = FakeReply("4ü2", reasoning_text="6 × 7")
_TOKENS = tuple("6 × 74ü2".encode())


def test_both_clients_have_the_same_methods() -> None:
    """Every public method is in both, with the same parameters."""

    def methods(kind: type) -> dict[str, list[inspect.Parameter]]:
        return {
            name: list(inspect.signature(method).parameters.values())
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert methods(Client) == methods(AsyncClient)


# -- results --------------------------------------------------------------------------------------


def test_generate_returns_texts_tokens_reason_and_usage(server: FakeServer, client: Client) -> None:
    """A whole answer holds everything, also where a character spans tokens."""
    server.reply(_REPLY)
    generation = client.generate("What is 6 × 7?")
    assert (generation.reasoning_text, generation.text) == ("6 × 7", "4ü2")
    assert generation.token_ids == _TOKENS
    assert generation.finish_reason is FinishReason.STOP
    assert generation.usage.completion_tokens == len(_TOKENS)
    assert generation.usage.prompt_tokens == generation.started.num_prompt_tokens == 15
    assert server.requests[0].prompt == "What is 6 × 7?"


async def test_generate_awaited_gives_the_same(
    server: FakeServer, async_client: AsyncClient
) -> None:
    """The asyncio client's result is the same value."""
    server.reply(_REPLY, _REPLY)
    with Client(server.target) as client:
        expected = await asyncio.to_thread(client.generate, "p")
    assert await async_client.generate("p") == expected


def test_a_stream_gives_chunks_and_adds_up_to_the_whole(server: FakeServer, client: Client) -> None:
    """What is streamed is what `generate` returns."""
    server.reply(_REPLY, _REPLY)
    with client.stream("p") as stream:
        started_before = stream.started
        chunks = list(stream)
        assert started_before is None
        assert stream.started is not None
        assert stream.collect() == client.generate("p")
    assert "".join(chunk.text for chunk in chunks) == "4ü2"
    assert "".join(chunk.reasoning_text for chunk in chunks) == "6 × 7"
    assert tuple(i for chunk in chunks for i in chunk.token_ids) == _TOKENS
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [FinishReason.STOP]


async def test_an_asynchronous_stream_gives_the_same_chunks(
    server: FakeServer, async_client: AsyncClient
) -> None:
    """Both clients make the same chunks of the same messages."""
    server.reply(_REPLY, _REPLY)
    chunks = [chunk async for chunk in async_client.stream("p")]
    with Client(server.target) as client:
        assert chunks == await asyncio.to_thread(lambda: list(client.stream("p")))


def test_several_choices_come_side_by_side(server: FakeServer, client: Client) -> None:
    """With n = 3 there are three whole choices, in a stream and at once."""
    server.reply(FakeReply("ab"), FakeReply("ab"))
    streamed = client.stream("p", n=3).collect()
    assert [(choice.index, choice.text) for choice in streamed.choices] == [
        (0, "ab"),
        (1, "ab"),
        (2, "ab"),
    ]
    assert client.generate("p", n=3).choices == streamed.choices


def test_chat_sends_the_conversation_and_options(server: FakeServer, client: Client) -> None:
    """Messages and options arrive as they were given."""
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    client.chat(messages, temperature=0.5, max_tokens=7, timeout_s=50)
    client.chat_stream(messages).collect()
    first, second = server.requests
    assert first.messages == (ChatMessage("system", "s"), ChatMessage("user", "u"))
    assert second.messages == first.messages
    assert first.options == {"temperature": 0.5, "max_tokens": 7}
    assert first.timeout_s is not None
    assert 40 < first.timeout_s < 51  # gRPC rounds
    assert second.timeout_s is None


def test_the_clients_own_timeout_holds_where_a_call_gives_none(server: FakeServer) -> None:
    """`ClientConfig.timeout_s` is the deadline of calls without one."""
    with Client(server.target, ClientConfig(timeout_s=30)) as client:
        client.generate("p")
    assert server.requests[0].timeout_s is not None
    assert 20 < server.requests[0].timeout_s < 31  # gRPC rounds


def test_the_other_calls_return_plain_values(server: FakeServer, client: Client) -> None:
    """Tokenize, detokenize, models and status, with the sums over replicas."""
    assert client.tokenize("hé").token_ids == (104, 0xC3, 0xA9)
    assert client.detokenize([104, 0xC3, 0xA9]) == "hé"
    (model,) = client.models()
    assert (model.name, model.has_chat_template) == ("fake", True)
    server.reply(FakeReply("ab", hold_after=1))
    with client.stream("p") as stream:
        next(stream)
        status = client.status()
        assert (status.num_running, status.num_waiting) == (1, 0)
        assert (status.num_blocks_used, status.num_blocks_cached) == (1, 10)
        assert status.num_blocks == status.num_blocks_free + 11
        assert status.replicas[0].model == "fake"
    flushed = client.flush_cache()
    assert (flushed.num_replicas, flushed.num_device_blocks, flushed.num_host_blocks) == (1, 10, 10)
    assert client.status().num_blocks_cached == 0
    assert client.drain("replica-0", time_limit_s=0.0001) == 0
    assert (server.drains[0].replica_id, server.drains[0].time_limit_ms) == ("replica-0", 1)
    with pytest.raises(InvalidRequestError, match="time_limit_ms"):
        client.drain(time_limit_s=-1)


async def test_the_other_calls_awaited_return_the_same(
    server: FakeServer, async_client: AsyncClient
) -> None:
    """The asyncio client's values are equal."""
    with Client(server.target) as client:
        assert await async_client.tokenize("hé") == await asyncio.to_thread(client.tokenize, "hé")
        assert await async_client.models() == await asyncio.to_thread(client.models)
        assert await async_client.status() == await asyncio.to_thread(client.status)
    assert await async_client.detokenize([104]) == "h"
    assert await async_client.drain("replica-0", undo=True) == 0
    assert server.drains[0].undo


@pytest.mark.parametrize("max_concurrency", [1, 3, 50])
def test_a_batch_keeps_the_prompts_order(
    max_concurrency: int, server: FakeServer, client: Client
) -> None:
    """Results stand where their prompts stood, whatever ran at once."""
    prompts = [f"prompt {i}" for i in range(20)]
    results = client.batch(prompts, max_concurrency=max_concurrency, max_tokens=50)
    assert [result.text for result in results] == prompts
    assert len(server.requests) == 20


async def test_an_awaited_batch_keeps_the_prompts_order(
    server: FakeServer, async_client: AsyncClient
) -> None:
    """The same, awaited."""
    prompts = [f"prompt {i}" for i in range(20)]
    results = await async_client.batch(prompts, max_concurrency=7)
    assert [result.text for result in results] == prompts


def test_a_batchs_first_error_cancels_the_rest(server: FakeServer, client: Client) -> None:
    """What hangs is cancelled, not waited for; the error is raised."""
    server.reply(FakeReply("ab", hold_after=1), FakeError("INVALID_ARGUMENT", "bad prompt"))
    with pytest.raises(InvalidRequestError, match="bad prompt"):
        client.batch(["a", "b"], max_concurrency=2)
    assert server.wait_open(0)


async def test_an_awaited_batchs_first_error_cancels_the_rest(
    server: FakeServer, async_client: AsyncClient
) -> None:
    """The same, awaited."""
    server.reply(FakeReply("ab", hold_after=1), FakeError("INVALID_ARGUMENT", "bad prompt"))
    with pytest.raises(InvalidRequestError, match="bad prompt"):
        await async_client.batch(["a", "b"], max_concurrency=2)
    assert await asyncio.to_thread(server.wait_open, 0)


# -- ends and cancellation ------------------------------------------------------------------------


def test_closing_a_stream_cancels_it_on_the_server(server: FakeServer, client: Client) -> None:
    """After `close` nothing more comes and the server is free."""
    server.reply(FakeReply("abc", hold_after=2))
    stream = client.stream("p")
    assert next(stream).token_ids == (97,)
    assert server.wait_open(1)
    stream.close()
    assert server.wait_open(0)
    assert list(stream) == []
    with pytest.raises(ProtocolError, match="choice 0 did not"):
        stream.collect()


def test_another_thread_may_close_a_stream_that_is_waited_for(
    server: FakeServer, client: Client
) -> None:
    """The waiting thread sees the end of the stream, not an error."""
    server.reply(FakeReply("abc", hold_after=1))
    stream = client.stream("p")
    next(stream)
    closer = threading.Thread(target=stream.close)
    closer.start()
    assert list(stream) == []
    closer.join()


async def test_aclose_cancels_the_stream_on_the_server(
    server: FakeServer, async_client: AsyncClient
) -> None:
    """After `aclose` nothing more comes and the server is free."""
    server.reply(FakeReply("abc", hold_after=2))
    stream = async_client.stream("p")
    assert (await anext(stream)).token_ids == (97,)
    await stream.aclose()
    assert await asyncio.to_thread(server.wait_open, 0)
    assert [chunk async for chunk in stream] == []


async def test_another_task_may_close_a_stream_that_is_waited_for(
    server: FakeServer, async_client: AsyncClient
) -> None:
    """The waiting task sees the end of the stream, not an error."""
    server.reply(FakeReply("abc", hold_after=1))
    stream = async_client.stream("p")
    await anext(stream)
    waiting = asyncio.create_task(anext(stream, None))
    await asyncio.sleep(0)  # lets the task begin to wait
    await stream.aclose()
    assert await waiting is None


async def test_cancelling_the_task_cancels_the_stream_on_the_server(
    server: FakeServer, async_client: AsyncClient
) -> None:
    """A cancelled reader leaves nothing behind."""
    server.reply(FakeReply("abc", hold_after=1))
    stream = async_client.stream("p")
    await anext(stream)
    waiting = asyncio.create_task(anext(stream, None))
    await asyncio.sleep(0)  # lets the task begin to wait
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await asyncio.to_thread(server.wait_open, 0)


async def test_cancelling_generate_cancels_it_on_the_server(
    server: FakeServer, async_client: AsyncClient
) -> None:
    """The same for an answer awaited whole."""
    server.reply(FakeReply("abc", hold_after=1))
    task = asyncio.create_task(async_client.generate("p"))
    assert await asyncio.to_thread(server.wait_open, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.wait_open, 0)


def test_a_deadline_that_passes_is_its_own_error(server: FakeServer, client: Client) -> None:
    """Where the server did not end in time, gRPC's deadline does."""
    server.reply(FakeReply("abc", hold_after=1), FakeReply("abc", hold_after=0))
    stream = client.stream("p", timeout_s=0.2)
    assert next(stream).token_ids == (97,)
    with pytest.raises(DeadlineExceededError):
        next(stream)
    with pytest.raises(DeadlineExceededError):
        client.generate("p", timeout_s=0.001)


def test_a_broken_stream_can_be_continued_with_every_token_once(
    server: FakeServer, client: Client
) -> None:
    """`continuation()` after an error, given to a new stream, brings exactly the rest."""
    error = FakeError("INTERNAL", "a fault", request_id="req-1")
    server.reply(FakeReply("4ü2", reasoning_text="6 × 7", fail_after=7, error=error))
    broken = client.stream("p", seed=5)
    received: list[Chunk] = []
    with pytest.raises(ServerFailureError):
        received.extend(broken)  # keeps what came before the error
    continuation = broken.continuation()
    assert continuation is not None
    assert (continuation.seed, continuation.choices[0].token_ids) == (5, _TOKENS[:7])
    resumed = client.stream("p", seed=5, continuation=continuation)
    received += list(resumed)
    assert resumed.started is not None
    assert resumed.started.resumed
    assert tuple(i for chunk in received for i in chunk.token_ids) == _TOKENS
    assert "".join(chunk.text for chunk in received) == "4ü2"
    assert "".join(chunk.reasoning_text for chunk in received) == "6 × 7"


def test_a_server_that_falls_silent_is_noticed_by_keepalive(server: FakeServer) -> None:
    """No deadline is needed: an unanswered ping breaks the stream, which can be continued."""
    server.reply(FakeReply("abc", hold_after=1))
    config = ClientConfig(keepalive_time_s=1, keepalive_timeout_s=1)
    with (
        SilentProxy(server.target) as proxy,
        Client(proxy.target, config, resume=False) as client,
    ):
        stream = client.stream("p")
        assert next(stream).token_ids == (97,)
        proxy.fall_silent()
        began_s = time.monotonic()
        with pytest.raises(UnavailableError):
            next(stream)
        assert time.monotonic() - began_s < 20  # far below gRPC's own minute, far above 2 s
        continuation = stream.continuation()
        assert continuation is not None
        assert continuation.choices[0].token_ids == (97,)
