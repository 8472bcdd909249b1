"""What decides about a request's place reaches the replica, and what it answers the caller."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from rillgate.errors import DeadlineExceededError, OverloadedError
from rillgate.sync_client import Client
from rillgate_proto.v1 import control_pb2, inference_pb2_grpc
from rillgate_proto.v1 import inference_pb2 as pb
from rillgate_server.core.clock import SystemClock
from rillgate_server.core.request import (
    PriorityClass,
    Rejection,
    RejectReason,
    Request,
    RequestRejected,
    Speculation,
)
from rillgate_server.gateway.inference import deadline_margin_s
from rillgate_server.gateway.process import Gateway
from rillgate_server.replica.engine_service import EngineService
from tests.gateway.stack import (
    PATIENCE_S,
    generate,
    open_channel,
    request,
    running_stack,
    served_model,
    with_config,
)
from tests.replica.engine_server import (
    WELCOME,
    ScriptedEngine,
    make_service,
    serving,
    socket_directory,
)

NEVER = Rejection(RejectReason.DEADLINE_NEVER, "not even idle", predicted_ttft_s=7.5)
NOW = Rejection(
    RejectReason.DEADLINE_NOW, "9000 ms behind what waits", retry_after_s=2.5, predicted_ttft_s=9.0
)
SECONDS = 60.0
"""A caller's deadline, far beyond what a test takes."""
LONGEST_S = 1.01 * SECONDS - deadline_margin_s(SECONDS)
"""What the gateway leaves the engine of it; gRPC rounds deadlines up by less than a hundredth."""


class RefusingEngine(ScriptedEngine):
    """Answers every request with one rejection."""

    def __init__(self, service: EngineService, rejection: Rejection) -> None:
        super().__init__()
        self._service = service
        self._rejection = rejection

    def submit(self, request: Request) -> None:
        """Record it, and refuse."""
        super().submit(request)
        self._service.on_event(RequestRejected(request.request_id, self._rejection))


@contextlib.asynccontextmanager
async def refusing(rejection: Rejection) -> AsyncIterator[tuple[str, RefusingEngine]]:
    """Serve a gateway over an engine that refuses; yield its address."""
    spec = served_model().spec
    welcome = replace(
        WELCOME,
        model_version_digest=spec.version_digest,
        tokenizer_digest=spec.tokenizer_digest,
    )
    service = make_service(welcome=welcome)
    engine = RefusingEngine(service, rejection)
    service.attach(engine)
    with socket_directory() as folder:
        async with serving(service, folder / "replica.sock"):
            config = with_config(replica_addresses=(f"unix:{folder / 'replica.sock'}",))
            gateway = Gateway(config, served_model(), SystemClock())
            await gateway.start()
            try:
                await gateway.wait_ready(PATIENCE_S)
                yield gateway.address, engine
            finally:
                await gateway.stop()


async def refusal(address: str) -> tuple[grpc.aio.AioRpcError, Any]:
    """Call, and return the error with its status."""
    async with open_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        call = stub.Complete(pb.CompleteRequest(request=request()), timeout=SECONDS)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
    return caught.value, rpc_status.from_call(cast("Any", caught.value))


def detail(status: Any, found: Message) -> Any:
    """Return the detail of the kind of `found`."""
    assert any(packed.Unpack(found) for packed in status.details)
    return found


async def test_a_deadline_out_of_reach_even_when_idle_is_deadline_exceeded() -> None:
    """With what was predicted and what was available, to people and programs."""
    async with refusing(NEVER) as (address, _):
        error, status = await refusal(address)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "7.500 s" in (error.details() or "")
    info = detail(status, error_details_pb2.ErrorInfo())
    assert info.reason == "DEADLINE_UNATTAINABLE"
    assert info.metadata["predicted_ms"] == "7500"
    available_ms = float(info.metadata["available_ms"])
    assert 0 < available_ms <= 1000 * LONGEST_S


async def test_a_deadline_out_of_reach_because_of_load_is_resource_exhausted() -> None:
    """A retry can pay, and is told when."""
    async with refusing(NOW) as (address, _):
        error, status = await refusal(address)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "9000 ms behind what waits" in (error.details() or "")
    retry = detail(status, error_details_pb2.RetryInfo())
    assert retry.retry_delay.ToTimedelta().total_seconds() == 2.5


async def test_the_client_tells_the_two_apart() -> None:
    """One says both numbers and is not tried again; the other can be, where there is time."""

    def call(address: str, timeout_s: float) -> None:
        with Client(address) as client:
            client.generate("hello", timeout_s=timeout_s)

    async with refusing(NEVER) as (address, engine):
        with pytest.raises(DeadlineExceededError, match=r"predicted after 7\.500 s.*available: "):
            await asyncio.to_thread(call, address, SECONDS)
        assert len(engine.requests) == 1
    async with refusing(NOW) as (address, engine):
        with pytest.raises(OverloadedError) as caught:
            await asyncio.to_thread(call, address, 2.0)
        assert caught.value.retry_after_s == 2.5


async def test_the_deadline_reaches_the_engine_less_the_margin_of_the_answer() -> None:
    """What the caller leaves, as a time of the engine's own clock; no deadline stays none."""
    async with refusing(NOW) as (address, engine):
        await refusal(address)
        async with open_channel(address) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Complete(pb.CompleteRequest(request=request()))
        timed, untimed = engine.requests
        assert timed.deadline_s is not None
        assert LONGEST_S - PATIENCE_S < timed.deadline_s - timed.arrival_s <= LONGEST_S
        assert untimed.deadline_s is None


@pytest.mark.parametrize(
    ("priority", "expected"),
    [
        (pb.PRIORITY_UNSPECIFIED, PriorityClass.NORMAL),
        (pb.PRIORITY_HIGH, PriorityClass.HIGH),
        (pb.PRIORITY_NORMAL, PriorityClass.NORMAL),
        (pb.PRIORITY_LOW, PriorityClass.LOW),
    ],
)
async def test_the_priority_reaches_the_engine(
    priority: pb.Priority, expected: PriorityClass
) -> None:
    """Each class; unset is normal."""
    async with refusing(NOW) as (address, engine), open_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Complete(pb.CompleteRequest(request=request(priority=priority)))
        assert [it.priority for it in engine.requests] == [expected]


async def test_a_priority_that_does_not_exist_is_refused() -> None:
    """By name, like any other value."""
    async with running_stack() as stack:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(stack, request(priority=9))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "priority is 9; allowed: " in (caught.value.details() or "")
        assert stack.replica.engine.requests == []


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (pb.SPECULATION_UNSPECIFIED, None),
        (pb.SPECULATION_OFF, Speculation.OFF),
        (pb.SPECULATION_PROMPT_LOOKUP, Speculation.PROMPT_LOOKUP),
        (pb.SPECULATION_DRAFT_MODEL, Speculation.DRAFT_MODEL),
        (pb.SPECULATION_AUTO, Speculation.AUTO),
    ],
)
async def test_the_kind_of_speculation_reaches_the_engine(
    asked: pb.Speculation, expected: Speculation | None
) -> None:
    """Each kind; unset is for the replica to say."""
    async with refusing(NOW) as (address, engine), open_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Complete(pb.CompleteRequest(request=request(speculation=asked)))
        assert [it.speculation for it in engine.requests] == [expected]


async def test_a_draft_model_that_is_not_there_is_refused_by_name() -> None:
    """Field, value and what is allowed; nothing of the request runs."""
    async with running_stack() as stack:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(stack, request(speculation=pb.SPECULATION_DRAFT_MODEL))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        details = caught.value.details() or ""
        assert "speculation is draft-model; allowed: off, prompt-lookup or auto" in details


@pytest.mark.parametrize("method", [pb.SPECULATION_PROMPT_LOOKUP, pb.SPECULATION_AUTO])
async def test_drafts_change_no_answer_of_the_gateway(method: pb.Speculation) -> None:
    """The whole path, with tokens that come several at a time."""
    async with running_stack() as stack:
        plain = await generate(stack, request(speculation=pb.SPECULATION_OFF))
        again = await generate(stack, request(speculation=method))
        assert again.text() == plain.text()


async def test_a_kind_of_speculation_that_does_not_exist_is_refused() -> None:
    """By name, like any other value."""
    async with running_stack() as stack:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(stack, request(speculation=9))
        assert "speculation is 9; allowed: " in (caught.value.details() or "")


async def test_a_flushed_cache_has_forgotten_every_prompt() -> None:
    """Its blocks are free again, and the same prompt is computed anew."""
    tokens = list(range(1, 41))
    async with running_stack() as stack:
        await generate(stack, request(tokens=tokens))
        await stack.replica.wait_idle()
        num_cached = stack.replica.loop.load().device.num_blocks_cached
        answer = await stack.control.FlushCache(control_pb2.FlushCacheRequest())
        assert (answer.num_replicas, answer.num_device_blocks) == (1, num_cached)
        assert num_cached > 0
        assert (await generate(stack, request(tokens=tokens))).started.num_cached_tokens == 0


async def test_flushing_another_model_or_without_a_replica_says_so() -> None:
    """NOT_FOUND names what is served; a lost replica is UNAVAILABLE."""
    async with running_stack() as stack:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.control.FlushCache(control_pb2.FlushCacheRequest(model="gpt"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        await stack.replica.crash()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.control.FlushCache(control_pb2.FlushCacheRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
