"""The link against a real Engine server on a Unix socket."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from rillgate_proto.v1 import engine_pb2, engine_pb2_grpc
from rillgate_server.core.request import FinishReason
from rillgate_server.core.step import ChoiceFinished, ChoiceTokens, RequestStarted, StepOutput
from rillgate_server.errors import NoReplica
from rillgate_server.gateway.replica_link import ReplicaLink
from rillgate_server.service.convert_engine import abort_command
from tests.replica.engine_server import (
    DEADLINE_S,
    WELCOME,
    ScriptedEngine,
    make_service,
    make_submission,
    next_events,
    read_all,
    serving,
    socket_directory,
    wait_until,
)


@pytest.fixture
def socket() -> Iterator[Path]:
    """Where the replica would listen."""
    with socket_directory() as directory:
        yield directory / "engine.sock"


@pytest.fixture
async def link(socket: Path) -> AsyncIterator[ReplicaLink]:
    """Yield a started link."""
    link = ReplicaLink(f"unix:{socket}")
    await link.start()
    yield link
    await link.close()


async def test_a_request_s_events_come_through(link: ReplicaLink, socket: Path) -> None:
    """Started, tokens and the end arrive under the stream that asked, and then it is over."""
    service, engine = make_service(), ScriptedEngine()
    service.attach(engine)
    async with serving(service, socket):
        await link.wait_ready(DEADLINE_S)
        assert link.welcome == WELCOME
        stream = link.submit(make_submission(5, 6))
        await engine.wait_until(lambda: len(engine.requests) == 1)
        request_id = engine.requests[0].request_id
        assert engine.requests[0].prompt_token_ids == (5, 6)
        service.on_event(
            StepOutput(
                1,
                started=(RequestStarted(request_id, 0.5, 0),),
                tokens=(ChoiceTokens(request_id, 0, 0, (7,)),),
            )
        )
        key = stream.request_key
        assert await next_events(stream) == [
            RequestStarted(key, 0.5, 0),
            ChoiceTokens(key, 0, 0, (7,)),
        ]
        service.on_event(
            StepOutput(
                2,
                tokens=(ChoiceTokens(request_id, 0, 1, (8,)),),
                finished=(ChoiceFinished(request_id, 0, FinishReason.STOP, 2),),
            )
        )
        assert await read_all(stream) == [
            ChoiceTokens(key, 0, 1, (8,)),
            ChoiceFinished(key, 0, FinishReason.STOP, 2),
        ]
        assert service.num_open_requests == 0
        assert engine.aborts == []


async def test_a_lost_replica_ends_its_streams_and_the_next_one_serves(
    link: ReplicaLink, socket: Path
) -> None:
    """Open streams raise NoReplica at once; when a server is back, so is the link."""
    service, engine = make_service(), ScriptedEngine()
    service.attach(engine)
    async with serving(service, socket):
        await link.wait_ready(DEADLINE_S)
        stream = link.submit(make_submission())
        await engine.wait_until(lambda: len(engine.requests) == 1)
    with pytest.raises(NoReplica):
        await next_events(stream)
    with pytest.raises(NoReplica):
        link.submit(make_submission())
    stream.abort()
    second, engine = make_service(), ScriptedEngine()
    second.attach(engine)
    async with serving(second, socket):
        await link.wait_ready(DEADLINE_S)
        link.submit(make_submission())
        await engine.wait_until(lambda: len(engine.requests) == 1)


async def test_a_command_for_a_run_that_has_ended_is_a_lost_replica(
    link: ReplicaLink, socket: Path
) -> None:
    """The link connects again: gRPC's InvalidStateError would end its task for good."""
    service = make_service()
    service.attach(ScriptedEngine())
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        async with serving(service, socket):
            run = engine_pb2_grpc.EngineStub(channel).Run()
            await run.wait_for_connection()
        await run.code()
        commands: asyncio.Queue[engine_pb2.EngineCommand] = asyncio.Queue()
        commands.put_nowait(abort_command(1))
        with pytest.raises(NoReplica):
            await link._write_commands(run, commands)


async def test_no_replica_says_so(link: ReplicaLink) -> None:
    """Callers of submit hear no path of ours; the operator who waits hears where and why."""
    with pytest.raises(NoReplica, match="no replica is connected now"):
        link.submit(make_submission())
    with pytest.raises(NoReplica, match=r"unix:.*engine\.sock"):
        await link.wait_ready(0.05)


async def test_a_closed_stream_aborts_its_request(link: ReplicaLink, socket: Path) -> None:
    """close() reaches the engine, twice is once, and a late event is dropped."""
    service, engine = make_service(), ScriptedEngine()
    service.attach(engine)
    async with serving(service, socket):
        await link.wait_ready(DEADLINE_S)
        stream = link.submit(make_submission())
        await engine.wait_until(lambda: len(engine.requests) == 1)
        reader = asyncio.create_task(next_events(stream))
        stream.close()
        stream.close()
        assert await reader == []
        await engine.wait_until(lambda: bool(engine.aborts))
        request_id = engine.requests[0].request_id
        assert engine.aborts == [(request_id, ())]
        service.on_event(StepOutput(1, tokens=(ChoiceTokens(request_id, 0, 0, (7,)),)))
        assert service.num_open_requests == 0


async def test_a_replica_of_another_protocol_is_not_used(socket: Path, link: ReplicaLink) -> None:
    """Its version is read from its Welcome, and the reason says both."""
    service, engine = make_service(welcome=replace(WELCOME, protocol_version=2)), ScriptedEngine()
    service.attach(engine)
    async with serving(service, socket):
        with pytest.raises(NoReplica, match=r"speaks version 2 .* this gateway version 1"):
            await link.wait_ready(0.5)
        assert not link.is_ready


async def test_a_gateway_may_refuse_a_replica(socket: Path) -> None:
    """The caller's reason is told to who waits; nothing is submitted."""
    service, engine = make_service(), ScriptedEngine()
    service.attach(engine)
    link = ReplicaLink(f"unix:{socket}", refuse=lambda welcome: f"{welcome.model} is not ours")
    async with serving(service, socket):
        await link.start()
        with pytest.raises(NoReplica, match="fake is not ours"):
            await link.wait_ready(0.5)
        with pytest.raises(NoReplica):
            link.submit(make_submission())
        await link.close()


async def test_events_that_arrived_before_the_loss_are_read_first(
    link: ReplicaLink, socket: Path
) -> None:
    """Tokens that were on this side stay; only then the stream says that the replica is gone."""
    service, engine = make_service(), ScriptedEngine()
    service.attach(engine)
    async with serving(service, socket):
        await link.wait_ready(DEADLINE_S)
        streams = [link.submit(make_submission()) for _ in range(2)]
        await engine.wait_until(lambda: len(engine.requests) == 2)
        ids = [request.request_id for request in engine.requests]
        step = tuple(ChoiceTokens(request_id, 0, 0, (7,)) for request_id in ids)
        service.on_event(StepOutput(1, tokens=step))
        assert await next_events(streams[1])  # so the same message has reached the other, too
        service.close()
        with pytest.raises(NoReplica):
            await next_events(streams[1])
        assert await next_events(streams[0]) == [ChoiceTokens(streams[0].request_key, 0, 0, (7,))]
        with pytest.raises(NoReplica):
            await next_events(streams[0])


async def test_the_load_is_kept_up_to_date_and_silence_is_noticed(
    link: ReplicaLink, socket: Path
) -> None:
    """What the replica last said is at hand, and gone with it."""
    assert not link.is_ready
    service, engine = make_service(load_interval_s=0.01), ScriptedEngine()
    service.attach(engine)
    async with serving(service, socket):
        await link.wait_ready(DEADLINE_S)
        link.submit(make_submission())
        await wait_until(lambda: link.load is not None and link.load.num_running == 1)
    await wait_until(lambda: not link.is_ready)
    assert link.load is None
