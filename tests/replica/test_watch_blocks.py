"""Watch with blocks over a real socket: scripted, and with a whole engine behind it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from rillgate_proto.v1 import engine_pb2, engine_pb2_grpc
from rillgate_server.core.block_events import BlockChange, BlockDelta, BlockEvent, BlockSnapshot
from rillgate_server.engine.testing import FakeCopies
from rillgate_server.replica.engine_service import EngineService
from rillgate_server.service.convert_blocks import blocks_from_wire
from rillgate_server.service.convert_engine import submit_command
from tests.gateway.stack import Replica, running_replica
from tests.replica.engine_server import (
    DEADLINE_S,
    ScriptedEngine,
    make_service,
    make_submission,
    serving,
    socket_directory,
    wait_until,
)
from tests.support.block_index import KnownBlocks

WITH_BLOCKS = engine_pb2.WatchRequest(with_blocks=True)
A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


@pytest.fixture
def socket() -> Iterator[Path]:
    """Where the replica listens."""
    with socket_directory() as directory:
        yield directory / "engine.sock"


@contextlib.asynccontextmanager
async def started(
    socket: Path, **limits: object
) -> AsyncIterator[tuple[EngineService, ScriptedEngine, Any]]:
    """Serve, and connect a stub. Any: the stubs' calls carry no types."""
    service, engine = make_service(load_interval_s=0.01, **limits), ScriptedEngine()
    service.attach(engine)
    async with (
        serving(service, socket),
        grpc.aio.insecure_channel(f"unix:{socket}") as channel,
    ):
        yield service, engine, engine_pb2_grpc.EngineStub(channel)


async def next_blocks(watch: Any) -> BlockEvent:
    """Read on to the next message about blocks."""
    async with asyncio.timeout(DEADLINE_S):
        while not (event := await watch.read()).HasField("blocks"):
            assert event is not grpc.aio.EOF
    return blocks_from_wire(event.blocks)


async def test_a_snapshot_comes_first_then_every_change(socket: Path) -> None:
    """Changes from before the snapshot are left out; numbers have no gap; Loads go on."""
    async with started(socket) as (service, engine, stub):
        watch = stub.Watch(WITH_BLOCKS)
        await engine.wait_until(lambda: engine.watch_ids == [1])
        service.on_event(BlockDelta(stored=((A,), ())))
        service.on_event(BlockSnapshot(1, ((A, B), ())))
        service.on_event(BlockDelta(stored=((), (C,)), evicted=((B,), ())))
        service.on_event(BlockDelta(is_cleared=True))
        events = [await next_blocks(watch) for _ in range(4)]
        assert [(it.sequence, it.change.name, it.hashes) for it in events] == [
            (1, "SNAPSHOT", (A, B)),
            (2, "EVICTED", (B,)),
            (3, "STORED", (C,)),
            (4, "CLEARED", ()),
        ]
        while not (await asyncio.wait_for(watch.read(), DEADLINE_S)).HasField("load"):
            pass
        watch.cancel()


async def test_who_asks_for_no_blocks_gets_none_and_the_engine_hears_nothing(
    socket: Path,
) -> None:
    """Others' snapshots and changes are not for it."""
    async with started(socket) as (service, engine, stub):
        watch = stub.Watch(engine_pb2.WatchRequest())
        await watch.read()
        other = stub.Watch(WITH_BLOCKS)
        await engine.wait_until(lambda: len(engine.watch_ids) == 1)
        service.on_event(BlockSnapshot(engine.watch_ids[0], ((A,), ())))
        service.on_event(BlockDelta(evicted=((A,), ())))
        assert (await next_blocks(other)).hashes == (A,)
        for _ in range(5):
            assert (await asyncio.wait_for(watch.read(), DEADLINE_S)).HasField("load")
        watch.cancel()
        other.cancel()
        await engine.wait_until(lambda: engine.watch_ids == [])


async def test_each_watch_has_its_own_snapshot_and_numbers(socket: Path) -> None:
    """The second one's snapshot is no news to the first."""
    async with started(socket) as (service, engine, stub):
        first = stub.Watch(WITH_BLOCKS)
        await engine.wait_until(lambda: engine.watch_ids == [1])
        service.on_event(BlockSnapshot(1, ((A,), ())))
        second = stub.Watch(WITH_BLOCKS)
        await engine.wait_until(lambda: engine.watch_ids == [1, 2])
        service.on_event(BlockDelta(stored=((B,), ())))
        service.on_event(BlockSnapshot(2, ((A, B), ())))
        service.on_event(BlockDelta(stored=((C,), ())))
        seen = [[await next_blocks(it) for _ in range(n)] for it, n in ((first, 3), (second, 2))]
        assert [[event.hashes for event in events] for events in seen] == [
            [(A,), (B,), (C,)],
            [(A, B), (C,)],
        ]
        assert [event.sequence for event in seen[1]] == [1, 2]
        first.cancel()
        second.cancel()


async def test_a_watcher_that_is_too_slow_is_dropped_and_may_come_again(socket: Path) -> None:
    """RESOURCE_EXHAUSTED with the limit; the engine hears that it has gone."""
    async with started(socket, max_pending_hashes=1) as (service, engine, stub):
        watch = stub.Watch(WITH_BLOCKS)
        await engine.wait_until(lambda: engine.watch_ids == [1])
        service.on_event(BlockSnapshot(1, ((A, B), ())))
        assert (await next_blocks(watch)).change is BlockChange.SNAPSHOT
        service.on_event(BlockDelta(evicted=((A, B), ())))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await next_blocks(watch)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "more than 1 changed blocks" in str(caught.value.details())
        await engine.wait_until(lambda: engine.watch_ids == [])
        again = stub.Watch(WITH_BLOCKS)
        await engine.wait_until(lambda: engine.watch_ids == [2])
        service.on_event(BlockSnapshot(2, ((), ())))
        assert (await next_blocks(again)).is_last
        again.cancel()


class Watcher:
    """Follows a replica's blocks in the background."""

    def __init__(self, stub: Any) -> None:
        """Begin to watch."""
        self.known = KnownBlocks()
        self._call = stub.Watch(WITH_BLOCKS)
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for event in self._call:
            if event.HasField("blocks"):
                self.known.take_event(blocks_from_wire(event.blocks))

    async def wait_equal(self, replica: Replica) -> None:
        """Wait until it knows exactly what the cache holds."""
        await replica.wait_idle()

        def is_equal() -> bool:
            if self._task.done():
                self._task.result()
            hashes = replica.scheduler.cached_hashes()
            return self.known.is_whole and self.known.equals(hashes)

        await wait_until(is_equal)

    async def close(self) -> None:
        """Stop watching; a message that made no sense is raised here."""
        self._call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


async def ask(stub: Any, first: int, count: int) -> None:
    """Run requests to their end."""
    run = stub.Run()
    for number in range(first, first + count):
        prompt = range(number * 3, number * 3 + 120)
        submission = make_submission(*prompt, max_tokens=12, ignore_eos=True)
        await run.write(submit_command(number, submission))
    await run.done_writing()
    async with asyncio.timeout(DEADLINE_S):
        async for _ in run:
            pass


async def test_two_watchers_of_a_busy_engine_know_its_cache() -> None:
    """One from the start, one that comes in the middle; both tiers, evictions, and a flush."""
    copies = FakeCopies(num_host_blocks=24)
    async with (
        running_replica(copies=copies) as replica,
        grpc.aio.insecure_channel(f"unix:{replica.socket}") as channel,
    ):
        stub: Any = engine_pb2_grpc.EngineStub(channel)
        early = Watcher(stub)
        await ask(stub, 1, 20)
        await early.wait_equal(replica)
        asking = asyncio.create_task(ask(stub, 21, 30))
        late = Watcher(stub)
        await asking
        load = replica.loop.load()
        assert load.device.num_evicted_blocks > 0
        for watcher in (early, late):
            await watcher.wait_equal(replica)
            assert any(watcher.known.by_tier.values())
        await stub.FlushCache(engine_pb2.EngineFlushCacheRequest())
        for watcher in (early, late):
            await watcher.wait_equal(replica)
            assert not any(watcher.known.by_tier.values())
            await watcher.close()
        await replica.wait_idle()
