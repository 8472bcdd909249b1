"""Errors, retries, readiness and several servers, for both clients over real gRPC."""

import asyncio
import threading

import grpc
import pytest

from rillgate import AsyncClient, Client, ClientConfig, RetryConfig
from rillgate.errors import (
    InvalidRequestError,
    OverloadedError,
    RillgateError,
    ServerFailureError,
    UnavailableError,
)
from rillgate.testing import FakeError, FakeReply, FakeServer
from rillgate.types import GenerateOptions


def test_an_invalid_request_names_its_fields_and_is_not_sent_again(
    server: FakeServer, client: Client
) -> None:
    """Violations and request id come from the details; one request arrived."""
    violations = InvalidRequestError("x").violations
    assert violations == ()
    from_server = FakeError("INVALID_ARGUMENT", "top_p is 7", request_id="req-1")
    server.reply(from_server)
    with pytest.raises(InvalidRequestError, match="top_p is 7") as caught:
        client.generate("p", top_p=7)
    assert caught.value.request_id == "req-1"
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert len(server.requests) == 1


def test_a_retry_waits_as_long_as_the_server_says_and_succeeds(
    server: FakeServer, client: Client
) -> None:
    """Both retryable errors with RetryInfo are passed over, in a stream and at once."""
    refusals = (
        FakeError("RESOURCE_EXHAUSTED", "full", retry_after_s=0.001),
        FakeError("UNAVAILABLE", "draining", retry_after_s=0.001),
    )
    server.reply(*refusals, FakeReply("a"), *refusals, FakeReply("b"))
    assert client.generate("p").text == "a"
    assert client.stream("p").collect().text == "b"
    assert len(server.requests) == 6


async def test_awaited_retries_do_the_same(server: FakeServer, async_client: AsyncClient) -> None:
    """The same, awaited."""
    refusal = FakeError("RESOURCE_EXHAUSTED", "full", retry_after_s=0.001)
    server.reply(refusal, FakeReply("a"), refusal, FakeReply("b"))
    assert (await async_client.generate("p")).text == "a"
    assert (await async_client.stream("p").collect()).text == "b"
    assert len(server.requests) == 4


def test_retries_end_with_the_last_error(server: FakeServer) -> None:
    """After max_attempts the error comes, with the server's own wait in it."""
    server.reply(*[FakeError("RESOURCE_EXHAUSTED", "full", retry_after_s=0.002)] * 5)
    config = ClientConfig(retry=RetryConfig(max_attempts=3))
    with Client(server.target, config) as client, pytest.raises(OverloadedError) as caught:
        client.generate("p")
    assert caught.value.retry_after_s == 0.002
    assert len(server.requests) == 3


def test_a_wait_beyond_the_deadline_is_not_begun(server: FakeServer, client: Client) -> None:
    """With less time left than the server asks to wait, the error comes at once."""
    server.reply(FakeError("RESOURCE_EXHAUSTED", "full", retry_after_s=20.0))
    with pytest.raises(OverloadedError):
        client.generate("p", timeout_s=5)
    assert len(server.requests) == 1


def test_without_resuming_nothing_is_sent_again_once_something_was_received(
    server: FakeServer,
) -> None:
    """A stream that breaks in its middle raises: the caller decides how to go on."""
    error = FakeError("UNAVAILABLE", "gone", retry_after_s=0.001)
    server.reply(FakeReply("abc", fail_after=1, error=error))
    with (
        Client(server.target, resume=False) as client,
        pytest.raises(UnavailableError, match="gone"),
    ):
        client.stream("p").collect()
    assert len(server.requests) == 1


async def test_a_stream_that_the_server_failed_is_not_sent_again(
    server: FakeServer, async_client: AsyncClient
) -> None:
    """A fault that the server owns up to would come again: it keeps its kind."""
    error = FakeError("INTERNAL", "internal error", request_id="req-9")
    server.reply(FakeReply("abc", fail_after=1, error=error))
    with pytest.raises(ServerFailureError) as caught:
        await async_client.stream("p").collect()
    assert (caught.value.request_id, caught.value.code) == ("req-9", "INTERNAL")
    assert len(server.requests) == 1


def test_no_server_is_an_unavailable_error() -> None:
    """A closed port is an UnavailableError without a wait from a server."""
    config = ClientConfig(retry=RetryConfig(max_attempts=1))
    with Client("127.0.0.1:1", config) as client, pytest.raises(UnavailableError) as caught:
        client.models()
    assert caught.value.retry_after_s is None


def test_a_misspelt_option_reaches_no_server(server: FakeServer, client: Client) -> None:
    """TypeError at once, from every method that takes options."""
    wrong: GenerateOptions = {"max_token": 1}  # type: ignore[typeddict-unknown-key]
    for call in (client.generate, client.stream, client.chat_stream):
        with pytest.raises(TypeError, match="max_tokens"):
            call([{"role": "user", "content": "x"}], **wrong)
    assert server.requests == []


def test_an_error_says_its_status_and_is_a_rillgate_error(
    server: FakeServer, client: Client
) -> None:
    """A status without a class of its own is a RillgateError with its code."""
    server.reply(FakeError("ABORTED", "why not"))
    with pytest.raises(RillgateError, match="why not") as caught:
        client.generate("p")
    assert caught.value.code == "ABORTED"


# -- readiness and several servers ----------------------------------------------------------------


def test_wait_ready_waits_for_the_health_service(server: FakeServer, client: Client) -> None:
    """It returns when the server turns ready, and raises when it does not in time."""
    server.set_ready(False)
    with pytest.raises(UnavailableError, match=r"within 0\.1 s"):
        client.wait_ready(0.1)
    waiter = threading.Thread(target=client.wait_ready, args=(20,))
    waiter.start()
    server.set_ready(True)
    waiter.join(20)
    assert not waiter.is_alive()


async def test_wait_ready_awaited(server: FakeServer, async_client: AsyncClient) -> None:
    """The same, awaited."""
    server.set_ready(False)
    waiting = asyncio.create_task(async_client.wait_ready(20))
    await asyncio.sleep(0)  # lets the task begin to wait
    server.set_ready(True)
    await waiting
    server.set_ready(False)
    with pytest.raises(UnavailableError):
        await async_client.wait_ready(0.1)


def test_several_addresses_share_the_calls(server: FakeServer) -> None:
    """Round robin reaches both servers; pick_first stays with one."""
    with FakeServer() as other:
        with Client([server.target, other.target]) as client:
            client.wait_ready(10)
            for _ in range(20):
                client.generate("p")
        assert len(server.requests) + len(other.requests) == 20
        assert min(len(server.requests), len(other.requests)) >= 5
        before = len(server.requests), len(other.requests)
        config = ClientConfig(balancing="pick_first")
        with Client([server.target, other.target], config) as client:
            for _ in range(5):
                client.generate("p")
        new = len(server.requests) - before[0], len(other.requests) - before[1]
        assert sorted(new) == [0, 5]


def test_a_server_that_is_down_is_left_out(server: FakeServer) -> None:
    """With one of two addresses dead every call still succeeds."""
    with Client(["127.0.0.1:1", server.target]) as client:
        assert [client.generate(str(i)).text for i in range(6)] == list("012345")
