"""How calls end before their answer does: deadlines, cancellation, a lost replica, a silent peer.

Each ends with no block held: `running_stack` checks that at its end, and the tests check when.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeAlias, cast

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from rillgate_proto.v1 import control_pb2, inference_pb2_grpc
from rillgate_proto.v1 import inference_pb2 as pb
from rillgate_server.errors import DeadlineExceeded
from rillgate_server.gateway.inference import InferenceService, deadline_margin_s
from tests.gateway.stack import (
    PATIENCE_S,
    Answer,
    Stack,
    expected_tokens,
    generate,
    open_channel,
    read,
    request,
    running_stack,
    with_config,
)

PROMPT = [1, 2, 3]
Call: TypeAlias = "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]"
LONG = 500


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    """A server for one test."""
    async with running_stack() as it:
        yield it


# -- deadlines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remaining_s", "margin_s"), [(0.1, 0.05), (1.0, 0.05), (2.0, 0.1), (10.0, 0.5), (60.0, 0.5)]
)
def test_the_deadlines_margin_is_five_percent_within_bounds(
    remaining_s: float, margin_s: float
) -> None:
    """At least 50 ms, so that the end arrives in time; at most 500 ms of a long one are lost."""
    assert deadline_margin_s(remaining_s) == pytest.approx(margin_s)


async def test_at_the_deadline_the_caller_gets_what_there_is(stack: Stack) -> None:
    """The stream ends OK, before the deadline, every choice with DEADLINE and its tokens so far."""
    stack.pace.hold()
    message = request(tokens=PROMPT, sampling__n=2, stopping__max_tokens=LONG)
    call = stack.inference.Generate(message, timeout=2.0)
    stack.pace.allow(6)
    answer = await read(call)
    for choice in range(2):
        assert answer.finished(choice).reason == pb.FINISH_REASON_DEADLINE
        got = answer.token_ids(choice)
        assert got == expected_tokens(stack, PROMPT, len(got))
        assert answer.finished(choice).usage.completion_tokens == len(got) > 0
    await stack.replica.wait_aborted()


async def test_a_deadline_in_the_queue_ends_with_started_and_no_token(stack: Stack) -> None:
    """Even then the stream has its shape: started, then finished."""
    stack.pace.hold()
    answer = await read(stack.inference.Generate(request(tokens=PROMPT), timeout=0.3))
    assert answer.started.num_prompt_tokens == 3
    assert answer.token_ids() == []
    assert answer.finished().reason == pb.FINISH_REASON_DEADLINE


async def test_complete_answers_at_the_deadline_with_what_there_is(stack: Stack) -> None:
    """The unary call has the same rule."""
    stack.pace.hold()
    message = request(tokens=PROMPT, stopping__max_tokens=LONG)
    call = stack.inference.Complete(pb.CompleteRequest(request=message), timeout=2.0)
    stack.pace.allow(4)
    (choice,) = (await call).choices
    assert choice.finished.reason == pb.FINISH_REASON_DEADLINE
    assert list(choice.token_ids) == expected_tokens(stack, PROMPT, len(choice.token_ids))


async def test_a_deadline_already_passed_is_deadline_exceeded(stack: Stack) -> None:
    """Nothing is begun for a request that arrives too late."""

    class Late:
        def time_remaining(self) -> float:
            return 0.0

    service = InferenceService(*cast("Any", [None] * 5))
    with pytest.raises(DeadlineExceeded):
        await service.Generate(request(), cast("Any", Late()))
    assert stack.replica.executor.num_steps == 0


# -- cancellation ---------------------------------------------------------------------------------


async def test_cancelling_in_the_queue_aborts(stack: Stack) -> None:
    """A request that waits for its first step is given up at once."""
    stack.pace.hold()
    running = asyncio.create_task(generate(stack, request(tokens=[9, 9])))
    call = stack.inference.Generate(request(tokens=PROMPT, stopping__max_tokens=LONG))
    await until_open(stack, 2)
    call.cancel()
    await stack.replica.wait_aborted()
    stack.pace.open()
    assert (await running).token_ids() == expected_tokens(stack, [9, 9], 8)


@pytest.mark.parametrize("num_choices", [1, 4])
async def test_cancelling_a_stream_frees_its_blocks_within_one_step(
    stack: Stack, num_choices: int
) -> None:
    """From the abort's arrival on, the step under way is the last that holds blocks."""
    stack.pace.hold()
    message = request(tokens=PROMPT * 10, stopping__max_tokens=LONG, sampling__n=num_choices)
    call = stack.inference.Generate(message)
    stack.pace.allow(3)
    assert (await call.read()).HasField("started")
    call.cancel()
    await stack.replica.wait_aborted()
    steps_before = stack.replica.executor.num_steps
    assert stack.replica.num_blocks_used > 0
    stack.pace.allow(1)
    await stack.replica.wait_idle()
    assert stack.replica.num_blocks_used == 0
    assert stack.replica.executor.num_steps <= steps_before + 1
    await until_open(stack, 0)


async def test_cancelling_a_unary_call_aborts(stack: Stack) -> None:
    """Complete holds nothing beyond its caller either."""
    stack.pace.hold()
    message = request(tokens=PROMPT, stopping__max_tokens=LONG)
    call = stack.inference.Complete(pb.CompleteRequest(request=message))
    await until_open(stack, 1)
    call.cancel()
    await stack.replica.wait_aborted()


async def test_a_caller_that_closes_its_connection_is_cancelled(stack: Stack) -> None:
    """All its streams end; others go on."""
    stack.pace.hold()
    neighbour = asyncio.create_task(generate(stack, request(tokens=[5, 6])))
    async with open_channel(stack.gateway.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        calls = [stub.Generate(request(tokens=[i], stopping__max_tokens=LONG)) for i in (1, 2)]
        await until_open(stack, 3)
    assert all(call.done() for call in calls)
    await until_open(stack, 1)
    stack.pace.open()
    assert (await neighbour).token_ids() == expected_tokens(stack, [5, 6], 8)


async def until_open(stack: Stack, num_calls: int) -> None:
    """Wait until so many calls are open, as operators see it."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            status = await stack.control.GetStatus(control_pb2.GetStatusRequest())
            if status.num_open_requests == num_calls:
                return


# -- a peer that vanished without a word ----------------------------------------------------------


class SilentProxy:
    """A TCP proxy that can stop forwarding without closing anything."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._is_silent = False

    async def __aenter__(self) -> "SilentProxy":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        for task in self._tasks:
            task.cancel()
        for writer in self._writers:
            writer.close()
        self._server.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def address(self) -> str:
        """Where callers connect."""
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def fall_silent(self) -> None:
        """Forward nothing any more; sockets stay open and keep being read."""
        self._is_silent = True

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        self._writers += [writer, far_writer]
        self._tasks += [
            asyncio.create_task(self._forward(reader, far_writer)),
            asyncio.create_task(self._forward(far_reader, writer)),
        ]

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if not self._is_silent:
                    writer.write(data)
                    await writer.drain()


async def test_a_caller_that_vanished_without_a_word_is_noticed_by_keepalive() -> None:
    """Behind a proxy that fell silent the stream ends within the two keepalive times."""
    config = with_config(keepalive_s=0.5, keepalive_timeout_s=0.5)
    async with running_stack(config) as stack, SilentProxy(stack.gateway.address) as proxy:
        stack.pace.hold()
        async with open_channel(proxy.address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            call = stub.Generate(request(tokens=PROMPT, stopping__max_tokens=LONG, sampling__n=2))
            assert (await first_message(stack, call)).HasField("started")
            assert stack.replica.num_blocks_used > 0
            loop = asyncio.get_running_loop()
            silent_s = loop.time()
            proxy.fall_silent()
            await stack.replica.wait_aborted()
            assert loop.time() - silent_s < 5.0, "ten times what was configured, and a slow machine"
            stack.pace.allow(1)
            await stack.replica.wait_idle()
            assert stack.replica.num_blocks_used == 0
            call.cancel()


# -- a replica that dies --------------------------------------------------------------------------


async def test_without_time_to_wait_a_crash_answers_every_stream_with_unavailable() -> None:
    """Within a second, with RetryInfo and what a continuation names, after the tokens that came."""
    async with running_stack(with_config(failover_wait_s=0)) as stack:
        await crash_under_streams(stack)


async def crash_under_streams(stack: Stack) -> None:
    """Crash under four started streams and check what each ends with."""
    stack.pace.hold()
    messages = [request(tokens=[i], stopping__max_tokens=LONG) for i in range(1, 5)]
    calls = [stack.inference.Generate(message) for message in messages]
    started = [(await first_message(stack, call)).started for call in calls]
    loop = asyncio.get_running_loop()
    crashed_s = loop.time()
    await stack.replica.crash()
    for call, start in zip(calls, started, strict=True):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        status = rpc_status.from_call(cast("Any", caught.value))
        assert status is not None
        assert any(it.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for it in status.details)
        info = error_details_pb2.ErrorInfo()
        assert any(it.Unpack(info) for it in status.details)
        assert info.reason == "STREAM_LOST"
        assert info.metadata["seed"] == str(start.seed)
        assert info.metadata["prompt_digest"] == start.prompt_digest.hex()
        assert int(info.metadata["num_tokens"]) >= 1
    assert loop.time() - crashed_s < 1.0
    stack.pace.open()


async def first_message(stack: Stack, call: Call) -> pb.GenerateResponse:
    """Read a stream's first message, with as few steps as that takes."""
    reading = asyncio.ensure_future(call.read())
    async with asyncio.timeout(PATIENCE_S):
        while not reading.done():
            stack.pace.allow(1)
            await asyncio.wait((reading,), timeout=0.05)
    message = reading.result()
    assert isinstance(message, pb.GenerateResponse)
    return message


async def test_without_a_replica_a_request_is_unavailable_at_once(stack: Stack) -> None:
    """It is not queued for a replica that may never come."""
    await stack.replica.crash()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(stack, request())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


# -- a slow reader --------------------------------------------------------------------------------


async def test_a_reader_that_pauses_holds_up_nobody_and_gets_everything_in_fewer_messages(
    stack: Stack,
) -> None:
    """The engine goes on to the end, a neighbour too; what gathered leaves in long messages."""
    num_tokens, num_choices = 800, 8
    message = request(
        tokens=PROMPT,
        stopping__max_tokens=num_tokens,
        stopping__ignore_eos=True,
        sampling__n=num_choices,
        response__logprobs=1,
    )
    slow = stack.inference.Generate(message)
    first = await slow.read()
    assert isinstance(first, pb.GenerateResponse)
    neighbour = await generate(stack, request(tokens=[5, 6]))
    assert neighbour.token_ids() == expected_tokens(stack, [5, 6], 8)
    await stack.replica.wait_idle()
    answer = Answer([first, *(await read(slow)).messages])
    expected = expected_tokens(stack, PROMPT, num_tokens)
    for choice in range(num_choices):
        assert answer.token_ids(choice) == expected
        assert len(answer.logprobs(choice)) == num_tokens
    num_outputs = sum(len(it.outputs) for it in answer.messages)
    assert num_outputs < num_tokens * num_choices / 2
