"""A gateway over several fake replicas, all in the test's process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import grpc

from rillgate_proto.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from rillgate_proto.v1 import inference_pb2 as pb
from rillgate_server.config.groups import BatcherConfig, GatewayConfig
from rillgate_server.core.clock import SystemClock
from rillgate_server.gateway.process import Gateway
from tests.gateway.stack import (
    BATCHER,
    GATEWAY,
    PATIENCE_S,
    Replica,
    greedy_tokens,
    open_channel,
    read,
    request,
    running_replica,
    served_model,
)

Call: TypeAlias = "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]"
NUM_TOKENS = 30


@dataclass
class FleetStack:
    """A gateway over several replicas, and stubs that call it."""

    gateway: Gateway
    replicas: list[Replica]
    inference: inference_pb2_grpc.InferenceStub
    control: control_pb2_grpc.ControlStub

    async def status(self) -> control_pb2.GetStatusResponse:
        """Return what the gateway knows."""
        status: control_pb2.GetStatusResponse = await self.control.GetStatus(
            control_pb2.GetStatusRequest()
        )
        return status

    async def until(
        self, condition: Callable[[control_pb2.GetStatusResponse], bool]
    ) -> control_pb2.GetStatusResponse:
        """Ask for the status until it is as wanted."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition(status := await self.status()):  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.01)
        return status

    def open(self) -> None:
        """Let all replicas run."""
        for replica in self.replicas:
            replica.pace.open()

    def hold(self) -> None:
        """Let no replica begin a step."""
        for replica in self.replicas:
            replica.pace.hold()

    def step(self, num_steps: int = 1) -> None:
        """Let all replicas make steps."""
        for replica in self.replicas:
            replica.pace.allow(num_steps)


@contextlib.asynccontextmanager
async def running_gateway(
    replicas: Sequence[Replica], config: GatewayConfig = GATEWAY, more: Sequence[str] = ()
) -> AsyncIterator[FleetStack]:
    """Serve over these replicas, and those at `more` addresses; at the end no block is held."""
    addresses = (*(it.address for it in replicas), *more)
    config = replace(config, replica_addresses=addresses)
    gateway = Gateway(config, served_model(), SystemClock())
    await gateway.start()
    try:
        await gateway.wait_ready(PATIENCE_S)
        async with open_channel(gateway.address) as channel:
            stack = FleetStack(
                gateway,
                list(replicas),
                inference_pb2_grpc.InferenceStub(channel),
                control_pb2_grpc.ControlStub(channel),
            )
            connected = control_pb2.REPLICA_STATE_READY
            await stack.until(
                lambda it: sum(r.state == connected for r in it.replicas) >= len(replicas)
            )
            yield stack
        for replica in replicas:
            replica.pace.open()
            await replica.wait_idle()
            assert replica.num_blocks_used == 0
    finally:
        for replica in replicas:
            replica.pace.open()
        await gateway.stop()


@contextlib.asynccontextmanager
async def running_fleet(
    num_replicas: int, config: GatewayConfig = GATEWAY, batcher: BatcherConfig = BATCHER
) -> AsyncIterator[FleetStack]:
    """Serve over so many fake replicas while the block runs."""
    async with contextlib.AsyncExitStack() as running:
        replicas = [
            await running.enter_async_context(running_replica(batcher=batcher))
            for _ in range(num_replicas)
        ]
        yield await running.enter_async_context(running_gateway(replicas, config))


def prompt(number: int) -> list[int]:
    """Return a prompt of its own for each number."""
    return [number + 1, number + 2, number + 3]


@dataclass
class Begun:
    """A call under way, and the tokens that were read of it already."""

    call: Call
    tokens: list[int] = field(default_factory=list)

    async def read_first(self, stack: FleetStack) -> None:
        """Let replicas make steps until the call has its first message."""
        reading = asyncio.ensure_future(self.call.read())
        async with asyncio.timeout(PATIENCE_S):
            while not reading.done():
                stack.step()
                await asyncio.wait((reading,), timeout=0.05)
        message = reading.result()
        assert isinstance(message, pb.GenerateResponse)
        self.tokens += (it for output in message.outputs for it in output.token_ids)


def begin(stack: FleetStack, number: int, timeout: float | None = None, **fields: object) -> Begun:
    """Call Generate for NUM_TOKENS tokens."""
    fields |= {"stopping__max_tokens": NUM_TOKENS, "stopping__ignore_eos": True}
    message = request(tokens=prompt(number), **fields)
    return Begun(stack.inference.Generate(message, timeout=timeout))


async def begin_all(stack: FleetStack, num_calls: int) -> list[Begun]:
    """Begin calls under held replicas, and let each have its first token."""
    stack.hold()
    calls = [begin(stack, number) for number in range(num_calls)]
    for call in calls:
        await call.read_first(stack)
    return calls


async def check_whole(stack: FleetStack, calls: Sequence[Begun]) -> None:
    """Read calls to their end: each has its tokens, each once."""
    for number, begun in enumerate(calls):
        tokens = [*begun.tokens, *(await read(begun.call)).token_ids()]
        assert tokens == greedy_tokens(stack.replicas[-1], prompt(number), NUM_TOKENS)
