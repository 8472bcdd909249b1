"""The border of the services: a bug becomes INTERNAL, and each call leaves one line."""

import logging
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc
import pytest

from rillgate_proto.v1 import inference_pb2 as pb
from rillgate_proto.v1 import inference_pb2_grpc
from rillgate_server.config.groups import GatewayConfig
from rillgate_server.errors import Overloaded
from rillgate_server.service.interceptors import CallBorder
from rillgate_server.service.server import bind, public_server

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name


class FaultyService(inference_pb2_grpc.InferenceServicer):
    """Fails in every way."""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        """Write once, then fall over a bug."""
        await context.write(pb.GenerateResponse())
        raise ZeroDivisionError(f"secret: {request.prompt}")

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """Refuse."""
        raise Overloaded("the queue holds 9 of 9 requests", 2.0)

    async def ListModels(self, request: object, context: object) -> pb.ListModelsResponse:
        """Answer."""
        return pb.ListModelsResponse()


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the faulty service behind the border."""
    config = GatewayConfig(listen="127.0.0.1:0")
    server = public_server(config, (CallBorder((SERVICE,)),))
    inference_pb2_grpc.add_InferenceServicer_to_server(FaultyService(), server)
    port = bind(server, config.listen)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    """A stub on it."""
    return inference_pb2_grpc.InferenceStub(channel)


async def test_a_bug_is_internal_and_its_traceback_is_in_the_log_alone(
    stub: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller gets the request id; the log has the id and the traceback."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.Generate(pb.GenerateRequest(), metadata=(("x-request-id", "job-1"),)):
            pass
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "job-1" in (caught.value.details() or "")
    assert "secret" not in str(caught.value)
    assert dict(cast("Any", caught.value.trailing_metadata()))["x-request-id"] == "job-1"
    (record,) = (it for it in caplog.records if it.name == "rillgate.error")
    assert "job-1" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


async def test_a_refusal_is_no_error_in_the_log(
    stub: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What the caller can mend is the caller's business."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Tokenize(pb.TokenizeRequest(prompt="x"))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not [it for it in caplog.records if it.levelno >= logging.WARNING]


async def test_each_call_leaves_one_line_with_fields_and_no_prompt(
    stub: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Method, id, status, time and peer; never what was asked."""
    caplog.set_level(logging.INFO, "rillgate.access")
    await stub.ListModels(pb.ListModelsRequest())
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Tokenize(pb.TokenizeRequest(prompt="my secret prompt"))
    records = [it for it in caplog.records if it.name == "rillgate.access"]
    fields = [cast("Any", it).fields for it in records]
    assert [it["status"] for it in fields] == ["OK", "RESOURCE_EXHAUSTED"]
    assert [it["method"] for it in fields] == [f"/{SERVICE}/ListModels", f"/{SERVICE}/Tokenize"]
    assert all(it["request_id"] and it["seconds"] >= 0 and it["peer"] for it in fields)
    assert "my secret" not in str(fields)


async def test_a_method_that_does_not_exist_is_unimplemented(channel: grpc.aio.Channel) -> None:
    """The border leaves gRPC's own answers alone."""
    call: Any = channel.unary_unary(f"/{SERVICE}/Nothing")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
