"""The link against a real Engine server on a Unix socket."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from rillgate_server.core.request import FinishReason
from rillgate_server.core.step import ChoiceFinished, ChoiceTokens, RequestStarted, StepOutput
from rillgate_server.errors import NoReplica
from rillgate_server.gateway.replica_link import ReplicaLink
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
