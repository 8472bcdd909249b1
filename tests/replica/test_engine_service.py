"""The Engine service over a real socket, with an engine that says what it is told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from rillgate_proto.v1 import engine_pb2, engine_pb2_grpc
from rillgate_server.core.request import (
    ChoiceStart,
    FinishReason,
    Rejection,
    RejectReason,
    RequestRejected,
)
from rillgate_server.core.step import ChoiceFinished, ChoiceTokens, RequestFailed, StepOutput
from rillgate_server.core.submission import Submission
from rillgate_server.replica.engine_service import EngineService
from rillgate_server.service.convert_engine import (
    abort_command,
    rejected_from_wire,
    step_output_from_wire,
    submit_command,
)
from tests.replica.engine_server import (
    DEADLINE_S,
    WELCOME,
    ScriptedEngine,
    make_service,
    make_submission,
    serving,
    socket_directory,
    wait_for,
)


@pytest.fixture
def socket() -> Iterator[Path]:
    """Where the replica listens."""
    with socket_directory() as directory:
        yield directory / "engine.sock"


@dataclass
class Setup:
    """A service, its engine, and a plain stub."""

    service: EngineService
    engine: ScriptedEngine
    stub: engine_pb2_grpc.EngineStub

    async def submit(self, run: "RunCall", key: int, submission: Submission | None = None) -> int:
        """Submit and return the engine's id of the request."""
        num_before = len(self.engine.requests)
        await run.write(submit_command(key, submission or make_submission()))
        await self.engine.wait_until(lambda: len(self.engine.requests) > num_before)
        return self.engine.requests[-1].request_id


if TYPE_CHECKING:  # only the stubs know the type parameters
    WatchCall = grpc.aio.UnaryStreamCall[engine_pb2.WatchRequest, engine_pb2.ReplicaEvent]
    RunCall = grpc.aio.StreamStreamCall[engine_pb2.EngineCommand, engine_pb2.EngineEvent]


@contextlib.asynccontextmanager
async def started(socket: Path, **options: object) -> AsyncIterator[Setup]:
    """Serve, and connect a stub."""
    service, engine = make_service(**options), ScriptedEngine()
    service.attach(engine)
    async with (
        serving(service, socket),
        grpc.aio.insecure_channel(f"unix:{socket}") as channel,
    ):
        yield Setup(service, engine, engine_pb2_grpc.EngineStub(channel))


async def read(run: "RunCall") -> engine_pb2.EngineEvent:
    """Read one event within the deadline."""
    event = await asyncio.wait_for(run.read(), DEADLINE_S)
    assert isinstance(event, engine_pb2.EngineEvent)
    return event


def tokens(request_id: int, offset: int, *token_ids: int, choice: int = 0) -> ChoiceTokens:
    """Build an entry."""
    return ChoiceTokens(request_id, choice, offset, token_ids)


async def test_one_message_per_step_carries_all_requests_of_a_stream(socket: Path) -> None:
    """Two requests' tokens of one step arrive together, under the keys of the stream."""
    async with started(socket) as setup:
        run = setup.stub.Run()
        first = await setup.submit(run, 41)
        second = await setup.submit(run, 40)
        setup.service.on_event(StepOutput(5, tokens=(tokens(first, 0, 1), tokens(second, 0, 2))))
        output = step_output_from_wire((await read(run)).step_output)
        assert output == StepOutput(5, tokens=(tokens(41, 0, 1), tokens(40, 0, 2)))
        run.cancel()


async def test_streams_get_their_own_requests_alone(socket: Path) -> None:
    """The same key in two streams names two requests."""
    async with started(socket) as setup:
        runs = setup.stub.Run(), setup.stub.Run()
        ids = [await setup.submit(run, 1) for run in runs]
        setup.service.on_event(StepOutput(5, tokens=(tokens(ids[0], 0, 10), tokens(ids[1], 0, 20))))
        for run, token_id in zip(runs, (10, 20), strict=True):
            output = step_output_from_wire((await read(run)).step_output)
            assert output.tokens == (tokens(1, 0, token_id),)
            run.cancel()


async def test_a_stalled_reader_s_outputs_merge_per_request(socket: Path) -> None:
    """20,000 steps into a reader that does not read leave few messages, and lose nothing."""
    async with started(socket) as setup:
        run = setup.stub.Run()
        request_id = await setup.submit(run, 1, make_submission(max_tokens=60_000))
        num_steps, per_step = 20_000, 3
        for step in range(num_steps):
            start = step * per_step
            setup.service.on_event(
                StepOutput(step + 1, tokens=(tokens(request_id, start, *range(start, start + 3)),))
            )
            if step % 1000 == 0:
                await asyncio.sleep(0)  # lets the I/O thread work as it would beside an engine
        end = ChoiceFinished(request_id, 0, FinishReason.LENGTH, num_steps * per_step)
        setup.service.on_event(StepOutput(num_steps + 1, finished=(end,)))
        received: list[int] = []
        num_messages = 0
        finished: tuple[ChoiceFinished, ...] = ()
        while not finished:
            output = step_output_from_wire((await read(run)).step_output)
            num_messages += 1
            for entry in output.tokens:
                assert entry.token_offset == len(received)
                received.extend(entry.token_ids)
            finished = output.finished
        assert received == list(range(num_steps * per_step))
        assert num_messages < num_steps / 20
        run.cancel()


async def test_past_the_buffer_s_limit_a_run_ends_and_its_requests_with_it(socket: Path) -> None:
    """A reader that never reads gets RESOURCE_EXHAUSTED; other streams go on."""
    async with started(socket, max_buffered_tokens=1000) as setup:
        stalled, other = setup.stub.Run(), setup.stub.Run()
        request_id = await setup.submit(stalled, 1)
        other_id = await setup.submit(other, 1)
        block = tuple(range(900))
        offset = 0
        while not setup.engine.aborts:  # until the transport's own buffers are full, too
            setup.service.on_event(StepOutput(1, tokens=(tokens(request_id, offset, *block),)))
            offset += len(block)
            assert offset < 100_000_000
            await asyncio.sleep(0)
        assert setup.engine.aborts == [(request_id, ())]
        setup.service.on_event(StepOutput(2, tokens=(tokens(other_id, 0, 7),)))
        assert (await read(other)).step_output.token_ids == [7]
        with contextlib.suppress(grpc.aio.AioRpcError):
            while True:
                await read(stalled)
        assert await stalled.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1000 tokens" in await stalled.details()
        other.cancel()


async def test_a_broken_run_ends_its_requests(socket: Path) -> None:
    """When the gateway is gone, the engine hears an abort for each open request, no other."""
    async with started(socket) as setup:
        run = setup.stub.Run()
        first = await setup.submit(run, 1)
        second = await setup.submit(run, 2)
        third = await setup.submit(run, 3)
        end = ChoiceFinished(second, 0, FinishReason.STOP, 0)
        setup.service.on_event(StepOutput(1, finished=(end,)))
        await read(run)
        run.cancel()
        await setup.engine.wait_until(lambda: len(setup.engine.aborts) == 2)
        assert {request_id for request_id, _ in setup.engine.aborts} == {first, third}
        assert setup.service.num_open_requests == 0


async def test_a_half_closed_run_ends_with_its_last_request(socket: Path) -> None:
    """A caller that says no more commands follow still gets what it asked for."""
    async with started(socket) as setup:
        run = setup.stub.Run()
        request_id = await setup.submit(run, 1)
        await run.done_writing()
        end = ChoiceFinished(request_id, 0, FinishReason.STOP, 1)
        setup.service.on_event(StepOutput(1, tokens=(tokens(request_id, 0, 5),), finished=(end,)))
        assert (await read(run)).step_output.token_ids == [5]
        assert await asyncio.wait_for(run.read(), DEADLINE_S) is grpc.aio.EOF
        assert await run.code() is grpc.StatusCode.OK
        assert setup.engine.aborts == []


async def test_a_wrong_submission_is_rejected_and_its_neighbours_live(socket: Path) -> None:
    """An empty Submit and a key used twice get Rejected; the stream goes on."""
    async with started(socket) as setup:
        run = setup.stub.Run()
        await run.write(engine_pb2.EngineCommand(submit=engine_pb2.Submit(request_key=1)))
        rejected = rejected_from_wire((await read(run)).rejected)
        assert rejected.request_id == 1
        assert rejected.rejection.reason is RejectReason.INVALID
        request_id = await setup.submit(run, 2)
        await run.write(submit_command(2, make_submission()))
        rejected = rejected_from_wire((await read(run)).rejected)
        assert "request_key is 2" in rejected.rejection.message
        setup.service.on_event(StepOutput(1, tokens=(tokens(request_id, 0, 5),)))
        assert (await read(run)).step_output.request_key == [2]
        run.cancel()


async def test_bytes_that_are_no_command_end_their_stream_alone(socket: Path) -> None:
    """The stream that sent them is over, with its requests; its neighbour does not notice."""
    async with started(socket) as setup, grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        neighbour = setup.stub.Run()
        neighbour_id = await setup.submit(neighbour, 1)
        raw: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(
            "/rillgate.v1.Engine/Run"
        )()
        await raw.write(submit_command(1, make_submission()).SerializeToString())
        await setup.engine.wait_until(lambda: len(setup.engine.requests) == 2)
        await raw.write(b"\xff\xff\xff")
        await setup.engine.wait_until(lambda: bool(setup.engine.aborts))
        assert setup.engine.aborts == [(setup.engine.requests[1].request_id, ())]
        assert await asyncio.wait_for(raw.code(), DEADLINE_S) is not grpc.StatusCode.OK
        setup.service.on_event(StepOutput(1, tokens=(tokens(neighbour_id, 0, 5),)))
        assert (await read(neighbour)).step_output.token_ids == [5]
        neighbour.cancel()


async def test_the_engine_s_refusal_reaches_the_stream(socket: Path) -> None:
    """Numbers and retry come along, and the request is closed."""
    async with started(socket) as setup:
        run = setup.stub.Run()
        request_id = await setup.submit(run, 9)
        rejection = Rejection(RejectReason.OVERLOADED, "full", 10, 1, 5, retry_after_s=0.25)
        setup.service.on_event(RequestRejected(request_id, rejection))
        assert rejected_from_wire((await read(run)).rejected) == RequestRejected(9, rejection)
        assert setup.service.num_open_requests == 0
        run.cancel()


async def test_a_failed_request_is_over(socket: Path) -> None:
    """The failure arrives, and nothing that follows for it does."""
    async with started(socket) as setup:
        run = setup.stub.Run()
        request_id = await setup.submit(run, 1)
        other_id = await setup.submit(run, 2)
        setup.service.on_event(StepOutput(1, failed=(RequestFailed(request_id, "NaN"),)))
        assert (await read(run)).step_output.failed[0].message == "NaN"
        late = StepOutput(2, tokens=(tokens(request_id, 0, 5), tokens(other_id, 0, 6)))
        setup.service.on_event(late)
        assert (await read(run)).step_output.request_key == [2]
        run.cancel()


async def test_an_abort_of_some_choices_leaves_the_others(socket: Path) -> None:
    """The engine hears which; the aborted one's late tokens are dropped; the last one is whole."""
    async with started(socket) as setup:
        run = setup.stub.Run()
        choices = tuple(map(ChoiceStart, range(3)))
        request_id = await setup.submit(run, 1, make_submission(choices=choices))
        await run.write(abort_command(1, (1,)))
        await setup.engine.wait_until(lambda: bool(setup.engine.aborts))
        assert setup.engine.aborts == [(request_id, (1,))]
        step = tuple(tokens(request_id, 0, 5, choice=choice) for choice in range(3))
        setup.service.on_event(StepOutput(1, tokens=step))
        assert (await read(run)).step_output.choice_index == [0, 2]
        for command in (abort_command(77), abort_command(1, (1,)), abort_command(1, (0, 2))):
            await run.write(command)
        await setup.engine.wait_until(lambda: len(setup.engine.aborts) == 2)
        assert setup.engine.aborts[1] == (request_id, ())
        assert setup.service.num_open_requests == 0
        run.cancel()


async def test_watch_says_welcome_then_load_idle_or_not(socket: Path) -> None:
    """The first event is the Welcome, and Loads follow without anything happening."""
    async with started(socket, load_interval_s=0.01) as setup:
        watch = setup.stub.Watch(engine_pb2.WatchRequest())
        first = await asyncio.wait_for(watch.read(), DEADLINE_S)
        assert first.welcome.replica_id == WELCOME.replica_id
        for _ in range(3):
            assert (await asyncio.wait_for(watch.read(), DEADLINE_S)).HasField("load")
        watch.cancel()


async def next_load(watch: "WatchCall") -> engine_pb2.Load:
    """Read on to the next Load."""
    async with asyncio.timeout(DEADLINE_S):
        async for event in watch:
            if event.HasField("load"):
                return event.load
    raise AssertionError("the Watch ended")


async def test_a_drain_shows_in_the_next_load_at_once_and_can_be_undone(socket: Path) -> None:
    """Not with the engine's next step, nor with the next Load's turn; streams go on."""
    async with started(socket, load_interval_s=1000.0) as setup:
        watch = setup.stub.Watch(engine_pb2.WatchRequest())
        assert (await next_load(watch)).state == engine_pb2.ENGINE_STATE_READY
        run = setup.stub.Run()
        request_id = await setup.submit(run, 1)
        answer = await setup.stub.Drain(engine_pb2.EngineDrainRequest())
        assert (answer.num_open_requests, setup.engine.is_draining) == (1, True)
        assert (await next_load(watch)).state == engine_pb2.ENGINE_STATE_DRAINING
        setup.service.on_event(StepOutput(1, tokens=(tokens(request_id, 0, 5),)))
        assert (await read(run)).step_output.token_ids == [5]
        await setup.stub.Drain(engine_pb2.EngineDrainRequest(undo=True))
        assert not setup.engine.is_draining
        assert (await next_load(watch)).state == engine_pb2.ENGINE_STATE_READY
        run.cancel()
        watch.cancel()


async def test_a_replica_that_ends_takes_no_requests_on_again(socket: Path) -> None:
    """The process is going; an undo says so instead of promising."""
    async with started(socket) as setup:
        await setup.stub.Drain(engine_pb2.EngineDrainRequest())
        await setup.stub.Drain(engine_pb2.EngineDrainRequest(undo=True))
        setup.service.drain()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await setup.stub.Drain(engine_pb2.EngineDrainRequest(undo=True))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert setup.engine.is_draining


async def test_a_load_says_how_much_of_the_machine_is_free(socket: Path) -> None:
    """Between 0 and 1, measured from one Load to the next."""
    async with started(socket, load_interval_s=0.11) as setup:
        watch = setup.stub.Watch(engine_pb2.WatchRequest())
        shares = [(await next_load(watch)).free_cpu_fraction for _ in range(4)]
        assert all(0.0 <= share <= 1.0 for share in shares)
        watch.cancel()


async def test_a_draining_service_is_done_with_its_last_message(socket: Path) -> None:
    """Not while a request runs; once its end was written."""
    async with started(socket) as setup:
        run = setup.stub.Run()
        request_id = await setup.submit(run, 1)
        setup.service.drain()
        assert setup.engine.is_draining
        done = asyncio.create_task(setup.service.wait_done())
        setup.service.on_event(StepOutput(1, tokens=(tokens(request_id, 0, 5),)))
        await read(run)
        assert not done.done()
        end = ChoiceFinished(request_id, 0, FinishReason.STOP, 1)
        setup.service.on_event(StepOutput(2, finished=(end,)))
        await read(run)
        await wait_for(done)
        run.cancel()
