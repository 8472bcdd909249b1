"""Streams that broke and went on, for both clients over real gRPC: every token exactly once."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from rillgate import AsyncClient, Client, ClientConfig, RetryConfig
from rillgate.errors import (
    ContinuationMismatchError,
    DeadlineExceededError,
    ModelNotFoundError,
    ProtocolError,
    RequestCancelledError,
    RillgateError,
    ServerFailureError,
    UnavailableError,
)
from rillgate.testing import FakeError, FakeReply, FakeServer
from rillgate.types import Chunk, FinishReason, Generation

_TEXT = "6 × 7 = 42, ✓"
_TOKENS = tuple(_TEXT.encode())
_QUICK = ClientConfig(retry=RetryConfig(first_backoff_s=0.001, max_resumes=3))

_BREAKS = [
    FakeError("UNAVAILABLE", "Stream removed (Socket closed)"),
    FakeError("INTERNAL", "Received RST_STREAM with error code 2"),
    FakeError("UNKNOWN", "Stream removed"),
    FakeError("CANCELLED", "Received RST_STREAM with error code 8"),
    FakeError("UNAVAILABLE", "this server is going down", retry_after_s=0.001, request_id="r"),
    FakeError("RESOURCE_EXHAUSTED", "full", retry_after_s=0.001, request_id="r"),
]


def _check_chunks(chunks: list[Chunk], text: str = _TEXT) -> None:
    """Check that one choice's chunks are those of a stream that never broke."""
    token_ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
    assert bytes(token_ids).decode() == text == "".join(chunk.text for chunk in chunks)
    offset = 0
    for chunk in chunks:
        assert chunk.token_offset == offset
        offset += len(chunk.token_ids)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [FinishReason.STOP]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(token_ids)


def _check_whole(generation: Generation, text: str) -> None:
    """Check that a result is that of a stream that never broke."""
    assert generation.text == text
    assert bytes(generation.token_ids).decode() == text
    assert generation.finish_reason is FinishReason.STOP
    assert generation.usage.completion_tokens == len(text.encode())
    assert not generation.started.resumed


# -- what is gone on with -------------------------------------------------------------------------


@pytest.mark.parametrize("error", _BREAKS, ids=lambda error: error.code + error.request_id)
@pytest.mark.parametrize("after", [1, 4, len(_TOKENS)], ids=lambda n: f"after {n}")
def test_a_stream_that_breaks_goes_on(
    server: FakeServer, client: Client, error: FakeError, after: int
) -> None:
    """The caller sees the chunks of an unbroken stream; the second call gave what there was."""
    server.reply(FakeReply(_TEXT, fail_after=after, error=error))
    stream = client.stream("p", seed=5)
    _check_chunks(list(stream))
    assert stream.num_resumes == stream.collect().num_resumes == 1
    assert [len(choice.token_ids) for choice in server.requests[1].given] == [after]
    assert stream.started is not None
    assert not stream.started.resumed


@pytest.mark.parametrize("error", _BREAKS, ids=lambda error: error.code + error.request_id)
async def test_an_awaited_stream_that_breaks_goes_on(
    server: FakeServer, async_client: AsyncClient, error: FakeError
) -> None:
    """The same, awaited."""
    server.reply(FakeReply(_TEXT, fail_after=4, error=error))
    stream = async_client.stream("p", seed=5)
    _check_chunks([chunk async for chunk in stream])
    assert stream.num_resumes == (await stream.collect()).num_resumes == 1


def test_a_stream_that_breaks_after_its_end_is_whole(server: FakeServer, client: Client) -> None:
    """Where every choice has ended nothing is missing but the status: no call is made for it."""
    server.reply(FakeReply(_TEXT, fail_after=1000))
    stream = client.stream("p")
    _check_chunks(list(stream))
    assert (stream.num_resumes, len(server.requests)) == (0, 1)


async def test_an_awaited_stream_that_breaks_after_its_end_is_whole(
    server: FakeServer, async_client: AsyncClient
) -> None:
    """The same, awaited."""
    server.reply(FakeReply(_TEXT, fail_after=1000))
    _check_chunks([chunk async for chunk in async_client.stream("p")])
    assert len(server.requests) == 1


def test_progress_begins_the_count_of_tries_anew(server: FakeServer) -> None:
    """With three tries in a row allowed, ten breaks with a token between them are survived."""
    server.reply(*(FakeReply(_TEXT, fail_after=n) for n in range(1, 11)))
    server.reply(FakeReply(_TEXT))
    with Client(server.target, _QUICK) as client:
        assert client.stream("p").collect().num_resumes == 10


def test_a_callers_own_continuation_is_resumed_too(server: FakeServer, client: Client) -> None:
    """The result holds what is new to the caller, from before and after the break."""
    with Client(server.target, resume=False) as once:
        server.reply(FakeReply(_TEXT, fail_after=3))
        broken = once.stream("p")
        with pytest.raises(UnavailableError):
            broken.collect()
    continuation = broken.continuation()
    assert continuation is not None
    server.reply(FakeReply(_TEXT, fail_after=6))
    stream = client.stream("p", continuation=continuation)
    generation = stream.collect()
    assert generation.token_ids == _TOKENS[3:]
    assert (generation.num_resumes, generation.started.resumed) == (1, True)
    assert [len(request.given[0].token_ids) for request in server.requests[1:]] == [3, 6]
    after = stream.continuation()
    assert after is not None
    assert after.choices[0].token_ids == _TOKENS


def test_choices_that_ended_before_the_break_are_not_given_again(
    server: FakeServer, client: Client
) -> None:
    """The server confirms their ends; the caller has them, with the usage that they had."""
    server.reply(FakeReply("ab", fail_after=1000, error=FakeError("INTERNAL", "RST_STREAM")))
    broken = client.stream("p", n=2)
    assert [chunk.finish_reason for chunk in broken].count(FinishReason.STOP) == 2
    continuation = broken.continuation()
    assert continuation is not None
    ended = client.stream("p", n=2, continuation=continuation)
    assert [(chunk.choice_index, chunk.token_offset) for chunk in ended] == [(0, 2), (1, 2)]
    assert ended.collect().choices[0].token_ids == ()


# -- what is not ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("NOT_FOUND", ModelNotFoundError),
        ("FAILED_PRECONDITION", ContinuationMismatchError),
        ("INTERNAL", ServerFailureError),
    ],
)
async def test_an_error_that_the_server_means_ends_the_stream(
    server: FakeServer, code: str, kind: type[RillgateError]
) -> None:
    """A version that is gone, a continuation of something else, a fault of the server: no loop."""
    server.reply(FakeReply(_TEXT, fail_after=4), FakeError(code, "no", request_id="r"))
    server.reply(FakeReply(_TEXT, fail_after=4), FakeError(code, "no", request_id="r"))
    async with AsyncClient(server.target, _QUICK) as client:
        stream = client.stream("p")
        with pytest.raises(kind, match="no"):
            await stream.collect()
    with Client(server.target, _QUICK) as threaded, pytest.raises(kind, match="no"):
        await asyncio.to_thread(threaded.stream("p").collect)
    assert len(server.requests) == 4
    continuation = stream.continuation()
    assert continuation is not None
    assert continuation.choices[0].token_ids == _TOKENS[:4]


def test_tries_without_progress_end_with_the_last_error(server: FakeServer) -> None:
    """After `max_resumes` in a row the error comes, and what it takes to go on is still there."""
    server.reply(FakeReply(_TEXT, fail_after=4))
    server.reply(*[FakeError("UNAVAILABLE", f"attempt {n}") for n in range(9)])
    with Client(server.target, _QUICK) as client:
        stream = client.stream("p")
        with pytest.raises(UnavailableError, match="attempt 2"):
            stream.collect()
        assert len(server.requests) == 4
        assert list(stream) == []
    continuation = stream.continuation()
    assert continuation is not None
    assert continuation.choices[0].token_ids == _TOKENS[:4]


def test_the_deadline_spans_all_calls(server: FakeServer, client: Client) -> None:
    """Each call has what is left of it, and a wait beyond it is not begun."""
    late = FakeError("UNAVAILABLE", "come later", retry_after_s=20.0)
    soon = FakeError("UNAVAILABLE", "come soon", retry_after_s=0.3)
    server.reply(
        FakeReply(_TEXT, fail_after=4, error=soon), FakeReply(_TEXT, fail_after=5, error=late)
    )
    with pytest.raises(UnavailableError, match="come later"):
        client.stream("p", timeout_s=10).collect()
    first, second = (request.timeout_s for request in server.requests)
    assert first is not None
    assert second is not None
    assert second < first - 0.2  # gRPC rounds, but not so much
    server.reply(FakeReply(_TEXT, fail_after=4), FakeReply(_TEXT, hold_after=5))
    with pytest.raises(DeadlineExceededError):
        client.stream("p", timeout_s=0.5).collect()


def test_a_choice_that_the_deadline_ended_is_final(server: FakeServer, client: Client) -> None:
    """It is listed as finished, and its reason stays."""
    server.reply(FakeReply(_TEXT, finish_reason=FinishReason.DEADLINE, fail_after=1000))
    assert client.stream("p").collect().finish_reason is FinishReason.DEADLINE
    assert len(server.requests) == 1


# -- whole answers --------------------------------------------------------------------------------


async def test_generate_survives_a_break(server: FakeServer, async_client: AsyncClient) -> None:
    """The answer that was asked for whole comes by a stream after the first break."""
    for call in (
        async_client.generate,
        lambda prompt: asyncio.to_thread(Client(server.target).generate, prompt),
    ):
        server.reply(FakeReply(_TEXT, fail_after=4), FakeReply(_TEXT, fail_after=6))
        generation = await call("p")
        _check_whole(generation, _TEXT)
        assert generation.num_resumes == 2


def test_generate_without_resuming_raises(server: FakeServer) -> None:
    """One call, and the error: UNAVAILABLE is tried again only as a refusal is."""
    server.reply(FakeReply(_TEXT, fail_after=4, error=FakeError("INTERNAL", "RST_STREAM")))
    with Client(server.target, resume=False) as client, pytest.raises(ServerFailureError):
        client.generate("p")
    assert len(server.requests) == 1


# -- ends while it waits --------------------------------------------------------------------------

_PATIENT = ClientConfig(retry=RetryConfig(max_wait_s=3600.0))
_LATER = FakeError("UNAVAILABLE", "come later", retry_after_s=600.0)


def test_closing_a_stream_that_waits_to_go_on_ends_it(server: FakeServer) -> None:
    """Another thread closes it: the waiting one sees the end, and no call is made."""
    server.reply(FakeReply(_TEXT, fail_after=1, error=_LATER))
    with Client(server.target, _PATIENT) as client, ThreadPoolExecutor(1) as pool:
        stream = client.stream("p")
        next(stream)
        rest = pool.submit(list, stream)
        assert server.wait_open(0)
        stream.close()
        assert rest.result(10) == []
    assert len(server.requests) == 1


def test_closing_the_client_ends_streams_that_wait_to_go_on(server: FakeServer) -> None:
    """Nobody waits for what cannot come any more."""
    server.reply(FakeReply(_TEXT, fail_after=1, error=_LATER))
    with ThreadPoolExecutor(1) as pool:
        with Client(server.target, _PATIENT) as client:
            stream = client.stream("p")
            next(stream)
            rest = pool.submit(list, stream)
            assert server.wait_open(0)
        with pytest.raises(RequestCancelledError, match="client was closed"):
            rest.result(10)
    assert list(stream) == []
    assert len(server.requests) == 1


@pytest.mark.parametrize("how", ["stream", "client", "task"])
@pytest.mark.parametrize("reply", [{"fail_after": 1, "error": _LATER}, {"hold_after": 1}])
async def test_an_awaited_stream_that_waits_ends_with_whatever_closes_it(
    server: FakeServer, how: str, reply: dict[str, object]
) -> None:
    """The stream, its client or the task that waits: nothing is left behind, and no call is made.

    The same while it waits for the next message as while it waits to go on.
    """
    server.reply(FakeReply(_TEXT, **reply))  # type: ignore[arg-type] # one of its fields
    client = AsyncClient(server.target, _PATIENT)
    stream = client.stream("p")
    await anext(stream)
    waiting = asyncio.create_task(stream.collect())
    await asyncio.sleep(0)  # lets the task begin to wait
    if "error" in reply:
        assert await asyncio.to_thread(server.wait_open, 0)
    if how == "stream":
        await stream.aclose()
        with pytest.raises(ProtocolError, match="choice 0 did not"):
            await waiting
    elif how == "client":
        await client.close()
        with pytest.raises(RequestCancelledError, match="client was closed"):
            await waiting
    else:
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert await asyncio.to_thread(server.wait_open, 0)
    assert [chunk async for chunk in stream] == []
    assert len(server.requests) == 1
    await client.close()
