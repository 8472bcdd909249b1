"""The gateway as operators see it: health, reflection, status, draining, and what it refuses."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from rillgate_proto.v1 import control_pb2
from rillgate_server.core.clock import SystemClock
from rillgate_server.errors import ConfigError, NoReplica
from rillgate_server.gateway.process import CONTROL, INFERENCE, Gateway
from rillgate_server.gateway.prompt import ServedModel
from tests.gateway.stack import (
    PATIENCE_S,
    Stack,
    expected_tokens,
    generate,
    open_channel,
    read,
    request,
    running_replica,
    running_stack,
    served_model,
    with_config,
)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NAMES = ("", INFERENCE, CONTROL, served_model().spec.name)


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    """A server for one test."""
    async with running_stack() as it:
        yield it


async def until_health(channel: grpc.aio.Channel, name: str, status: int) -> None:
    """Watch a name until it has this status."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=name))
    async with asyncio.timeout(PATIENCE_S):
        async for answer in watch:
            if answer.status == status:
                break
    watch.cancel()


async def test_health_follows_the_replica_and_not_the_process(stack: Stack) -> None:
    """Each name is SERVING with a replica, NOT_SERVING without, though the gateway answers."""
    for name in NAMES:
        await until_health(stack.channel, name, SERVING)
    await stack.replica.crash()
    for name in NAMES:
        await until_health(stack.channel, name, NOT_SERVING)


async def test_health_of_an_unknown_name_is_not_found(stack: Stack) -> None:
    """As the health protocol says."""
    stub: Any = health_pb2_grpc.HealthStub(stack.channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="gpt"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_and_describes_the_services(stack: Stack) -> None:
    """A generic client can call us without our proto files."""
    # Any: these packages' types know synchronous channels alone.
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", stack.channel))
    make: Any = reflection_pb2.ServerReflectionRequest
    asks = [
        make(list_services=""),
        make(file_containing_symbol=INFERENCE),
    ]
    answers = [answer async for answer in stub.ServerReflectionInfo(iter(asks))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {INFERENCE, CONTROL, "grpc.health.v1.Health"} <= names
    assert answers[1].file_descriptor_response.file_descriptor_proto


async def test_channelz_tells_of_the_server(stack: Stack) -> None:
    """The server's own sockets and calls can be looked at."""
    stub: Any = channelz_pb2_grpc.ChannelzStub(cast("Any", stack.channel))
    servers = await stub.GetServers(channelz_pb2.GetServersRequest(start_server_id=0))
    assert servers.server


async def test_status_tells_what_runs_and_what_the_cache_holds(stack: Stack) -> None:
    """Counts of requests and blocks, of the model that is served."""
    stack.pace.hold()
    message = request(tokens=[1] * 20, sampling__n=2, stopping__max_tokens=500)
    call = asyncio.create_task(generate(stack, message))
    async with asyncio.timeout(PATIENCE_S):
        while True:
            stack.pace.allow(1)  # loads are gathered now and then, between two steps
            status = await stack.control.GetStatus(control_pb2.GetStatusRequest())
            (replica,) = status.replicas
            if replica.num_running == 2:
                break
    assert status.num_open_requests == 1
    assert replica.model == served_model().spec.name
    assert replica.state == control_pb2.REPLICA_STATE_READY
    device = replica.device
    assert device.num_blocks_used > 0
    assert device.num_blocks == (
        device.num_blocks_free + device.num_blocks_used + device.num_blocks_cached
    )
    stack.pace.open()
    await call


async def test_draining_says_so_refuses_new_calls_and_lets_running_ones_finish() -> None:
    """The order of SIGTERM: health first, then no new work; open streams get all their tokens."""
    async with running_stack() as stack, open_channel(stack.gateway.address) as other:
        stack.pace.hold()
        running = asyncio.create_task(generate(stack, request(tokens=[1, 2, 3])))
        stack.pace.allow(2)
        await until_health(other, "", SERVING)
        async with asyncio.timeout(PATIENCE_S):
            while (
                await stack.control.GetStatus(control_pb2.GetStatusRequest())
            ).num_open_requests == 0:
                pass
        drain = asyncio.create_task(stack.gateway.drain(PATIENCE_S))
        await until_health(other, "", NOT_SERVING)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(stack, request())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        status = rpc_status.from_call(cast("Any", caught.value))
        assert status is not None
        assert any(it.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for it in status.details)
        assert not drain.done()
        stack.pace.open()
        assert (await running).token_ids() == expected_tokens(stack, [1, 2, 3], 8)
        await drain


async def test_a_drain_ends_with_its_grace_and_what_runs_is_cut_off() -> None:
    """A stream that does not end holds the process no longer than the grace."""
    async with running_stack() as stack:
        stack.pace.hold()
        call = stack.inference.Generate(request(tokens=[1, 2, 3]))
        stack.pace.allow(2)
        assert (await call.read()).HasField("started")
        await stack.gateway.drain(0.1)
        await stack.gateway.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("field", ["version_digest", "tokenizer_digest"])
async def test_a_replica_of_another_checkpoint_is_refused(field: str) -> None:
    """A gateway never speaks for a model that it does not know."""
    ours = served_model()
    model = ServedModel(replace(ours.spec, **cast("Any", {field: "ee" * 32})), ours.text)
    async with running_replica() as replica:
        config = with_config(replica_addresses=(f"unix:{replica.socket}",))
        gateway = Gateway(config, model, SystemClock())
        await gateway.start()
        try:
            with pytest.raises(NoReplica, match=f"{field.partition('_')[0]} is"):
                await gateway.wait_ready(0.5)
        finally:
            await gateway.stop()


async def test_a_port_in_use_is_refused_at_once(stack: Stack) -> None:
    """A second server does not silently take half of the calls."""
    with pytest.raises(ConfigError, match=r"gateway.listen is '127.0.0.1:\d+'.* in use"):
        Gateway(with_config(listen=stack.gateway.address), served_model(), SystemClock())


def test_the_gateway_never_loads_torch_nor_transformers() -> None:
    """Its process stays small and starts fast, whatever the model."""
    code = (
        "import sys, rillgate_server.gateway.process, rillgate_server.cli.commands;"
        "loaded = {'torch', 'transformers', 'safetensors', 'numpy'} & set(sys.modules);"
        "assert not loaded, loaded"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert outcome.returncode == 0, outcome.stderr.decode()
