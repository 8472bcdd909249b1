"""FlushCache over a real socket: what the engine's thread answers, late, never, or to nobody."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from rillgate_proto.v1 import engine_pb2, engine_pb2_grpc
from rillgate_server.core.load import FlushedBlocks
from rillgate_server.errors import NoReplica
from rillgate_server.gateway.replica_link import ReplicaLink
from tests.replica.engine_server import (
    DEADLINE_S,
    ScriptedEngine,
    make_service,
    serving,
    socket_directory,
)

REQUEST = engine_pb2.EngineFlushCacheRequest()


@pytest.fixture
def socket() -> Iterator[Path]:
    """Where the replica listens."""
    with socket_directory() as directory:
        yield directory / "engine.sock"


@contextlib.asynccontextmanager
async def started(socket: Path) -> AsyncIterator[tuple[ScriptedEngine, Any]]:
    """Serve, and connect a stub. Any: the stubs' calls carry no types."""
    service, engine = make_service(), ScriptedEngine()
    service.attach(engine)
    async with (
        serving(service, socket),
        grpc.aio.insecure_channel(f"unix:{socket}") as channel,
    ):
        yield engine, engine_pb2_grpc.EngineStub(channel)


async def test_the_answer_is_the_engine_s(socket: Path) -> None:
    """It waits for the engine's thread, and tells each tier's blocks."""
    async with started(socket) as (engine, stub):
        call = stub.FlushCache(REQUEST)
        await engine.wait_until(lambda: len(engine.flushes) == 1)
        engine.flushes[0].set_result(FlushedBlocks(3, 4))
        answer = await asyncio.wait_for(call, DEADLINE_S)
        assert (answer.num_device_blocks, answer.num_host_blocks) == (3, 4)


async def test_a_caller_that_goes_away_leaves_the_engine_s_future_alone(socket: Path) -> None:
    """The engine's thread would trip over one that was cancelled behind its back."""
    async with started(socket) as (engine, stub):
        gone = stub.FlushCache(REQUEST)
        await engine.wait_until(lambda: len(engine.flushes) == 1)
        gone.cancel()
        next_one = stub.FlushCache(REQUEST)  # served after the cancellation, on the same stream
        await engine.wait_until(lambda: len(engine.flushes) == 2)
        for flushed in engine.flushes:
            flushed.set_result(FlushedBlocks(0, 0))
        await asyncio.wait_for(next_one, DEADLINE_S)


async def test_an_engine_that_has_ended_is_unavailable(socket: Path) -> None:
    """Its future is cancelled; the caller learns why."""
    async with started(socket) as (engine, stub):
        call = stub.FlushCache(REQUEST)
        await engine.wait_until(lambda: len(engine.flushes) == 1)
        engine.flushes[0].cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call, DEADLINE_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@contextlib.asynccontextmanager
async def linked(socket: Path) -> AsyncIterator[ReplicaLink]:
    """Yield a link that was started."""
    link = ReplicaLink(f"unix:{socket}")
    await link.start()
    try:
        yield link
    finally:
        await link.close()


async def test_the_link_flushes_the_replica_behind_it(socket: Path) -> None:
    """In core's plain type."""
    async with started(socket) as (engine, _), linked(socket) as link:
        await link.wait_ready(DEADLINE_S)
        flushing = asyncio.create_task(link.flush_cache())
        await engine.wait_until(lambda: len(engine.flushes) == 1)
        engine.flushes[0].set_result(FlushedBlocks(1, 2))
        assert await asyncio.wait_for(flushing, DEADLINE_S) == FlushedBlocks(1, 2)


async def test_a_replica_that_is_lost_meanwhile_is_no_replica(socket: Path) -> None:
    """Neither a lost connection nor none at all is a cancelled call or a hang."""
    async with linked(socket) as link:
        with pytest.raises(NoReplica):
            await link.flush_cache()
        async with started(socket) as (engine, _):
            await link.wait_ready(DEADLINE_S)
            flushing = asyncio.create_task(link.flush_cache())
            await engine.wait_until(lambda: len(engine.flushes) == 1)
        with pytest.raises(NoReplica):
            await asyncio.wait_for(flushing, DEADLINE_S)


async def test_a_link_that_closes_meanwhile_is_no_replica(socket: Path) -> None:
    """The gateway's own end is told like a replica's."""
    async with started(socket) as (engine, _):
        async with linked(socket) as link:
            await link.wait_ready(DEADLINE_S)
            flushing = asyncio.create_task(link.flush_cache())
            await engine.wait_until(lambda: len(engine.flushes) == 1)
        with pytest.raises(NoReplica):
            await asyncio.wait_for(flushing, DEADLINE_S)
