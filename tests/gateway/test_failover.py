"""Streams over several replicas: what is lost, refused, drained or stuck goes on elsewhere.

Fake replicas in the test's process, a real gateway and real connections between them. That whole
processes may die is tests.end_to_end.test_survival's to show.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from rillgate_proto.v1 import control_pb2
from rillgate_proto.v1 import inference_pb2 as pb
from rillgate_server.core.request import Rejection, RejectReason
from rillgate_server.routing.continuation import MAX_BREAKS
from tests.gateway.fleet_stack import (
    NUM_TOKENS,
    Begun,
    FleetStack,
    begin,
    begin_all,
    check_whole,
    prompt,
    running_fleet,
    running_gateway,
)
from tests.gateway.stack import (
    BATCHER,
    PATIENCE_S,
    Replica,
    greedy_tokens,
    read,
    running_replica,
    served_model,
    with_config,
)
from tests.gateway.test_admission import RefusingEngine
from tests.replica.engine_server import WELCOME, make_service, serving, socket_directory

DRAINING = control_pb2.REPLICA_STATE_DRAINING
READY = control_pb2.REPLICA_STATE_READY
FROZEN = control_pb2.REPLICA_STATE_FROZEN


async def error_of(begun: Begun) -> grpc.aio.AioRpcError:
    """Return what a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(begun.call)
    return caught.value


async def code_of(begun: Begun) -> grpc.StatusCode:
    """Return how a call ends."""
    try:
        await read(begun.call)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def info_of(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    """Return an error's ErrorInfo."""
    status = rpc_status.from_call(cast("Any", error))
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return info


# -- a replica is lost ----------------------------------------------------------------------------


async def test_streams_of_a_crashed_replica_go_on_at_another() -> None:
    """Six streams over two replicas, one crashes: all six are whole, and half of them moved."""
    async with running_fleet(2) as stack:
        calls = await begin_all(stack, 6)
        status = await stack.status()
        num_streams = [it.num_streams for it in status.replicas]
        assert min(num_streams) >= 1
        await stack.replicas[0].crash()
        stack.open()
        await check_whole(stack, calls)
        assert (await stack.status()).num_moved_streams == num_streams[0]


async def test_streams_wait_for_a_successor() -> None:
    """The only replica crashes; another process takes its place, and they go on there."""
    async with running_replica() as first, running_gateway([first]) as stack:
        calls = await begin_all(stack, 3)
        await first.crash()
        await stack.until(lambda it: it.num_waiting_streams == 3)
        async with running_replica(at=first.socket) as second:
            stack.open()
            await check_whole(stack, calls)
            assert second.executor.num_steps > 0
            await second.wait_idle()


async def test_without_a_successor_streams_end_with_what_a_continuation_needs() -> None:
    """UNAVAILABLE after the wait, not before: STREAM_LOST names the seed and counts the tokens."""
    async with running_fleet(1, with_config(failover_wait_s=0.4)) as stack:
        (call,) = await begin_all(stack, 1)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        await stack.replicas[0].crash()
        error = await error_of(call)
        assert loop.time() - began_s >= 0.3
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        info = info_of(error)
        assert info.reason == "STREAM_LOST"
        assert int(info.metadata["num_tokens"]) >= len(call.tokens)
        stack.open()


async def test_a_deadline_during_the_wait_ends_with_what_there_is() -> None:
    """OK and DEADLINE, as at any other time."""
    async with running_fleet(1) as stack:
        stack.hold()
        call = begin(stack, 0, timeout=3.0)
        await call.read_first(stack)
        await stack.replicas[0].crash()
        answer = await read(call.call)
        assert answer.finished().reason == pb.FINISH_REASON_DEADLINE
        num_tokens = len(call.tokens) + len(answer.token_ids())
        assert answer.finished().usage.completion_tokens == num_tokens
        stack.open()


async def test_a_request_that_kills_its_replica_does_not_kill_them_all() -> None:
    """After three breaks without a token it is given up; the last replica never sees it."""
    async with running_fleet(MAX_BREAKS + 1) as stack:
        stack.hold()
        call = begin(stack, 0)
        seen: set[str] = set()
        for _ in range(MAX_BREAKS):
            victim = await until_seen(stack, seen)
            seen.add(victim.replica_id)
            await victim.crash()
        error = await error_of(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "again and again" in (error.details() or "")
        (spared,) = (it for it in stack.replicas if it.replica_id not in seen)
        assert not spared.engine.requests
        stack.open()


async def until_seen(stack: FleetStack, seen: set[str]) -> Replica:
    """Wait until a request has reached a replica that is not in `seen`."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            for replica in stack.replicas:
                if replica.engine.requests and replica.replica_id not in seen:
                    return replica
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("has_sent_them", [False, True])
async def test_prompt_logprobs_come_once(has_sent_them: bool) -> None:
    """Whether the replica was lost before it had given them or after."""
    async with running_fleet(2) as stack:
        stack.hold()
        call = begin(stack, 0, response__prompt_logprobs=1).call
        messages: list[pb.GenerateResponse] = []
        if has_sent_them:
            reading = asyncio.ensure_future(call.read())
            async with asyncio.timeout(PATIENCE_S):
                while not reading.done():
                    stack.step()
                    await asyncio.wait((reading,), timeout=0.05)
            messages.append(cast("pb.GenerateResponse", reading.result()))
        victim = await until_seen(stack, set())
        await victim.crash()
        stack.open()
        messages += (await read(call)).messages
        logprobs = [it.token_id for message in messages for it in message.prompt_logprobs]
        assert logprobs == prompt(0)[1:]


async def test_a_frozen_replica_loses_its_streams_and_keeps_its_connection() -> None:
    """Its Loads say that a step is too old; its streams go on elsewhere, and it is used again once
    it makes steps."""
    async with running_fleet(2) as stack:
        calls = await begin_all(stack, 4)
        frozen = stack.replicas[0]
        load = frozen.engine.load
        frozen.engine.load = lambda: replace(load(), step_age_s=1000.0)
        status = await stack.until(lambda it: it.replicas[0].state == FROZEN)
        assert status.replicas[0].num_streams == 0
        stack.replicas[1].pace.open()
        await check_whole(stack, calls)
        frozen.engine.load = load
        stack.open()
        await stack.until(lambda it: it.replicas[0].state == READY)


# -- a replica refuses ----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def a_refusing_one(rejection: Rejection) -> AsyncIterator[tuple[RefusingEngine, str]]:
    """Serve an engine that takes nothing on; yield it and its address."""
    spec = served_model().spec
    service = make_service(
        welcome=replace(
            WELCOME,
            incarnation=1,
            model_version_digest=spec.version_digest,
            tokenizer_digest=spec.tokenizer_digest,
            max_context_tokens=spec.max_context_tokens,
        )
    )
    engine = RefusingEngine(service, rejection)
    service.attach(engine)
    with socket_directory() as folder:
        async with serving(service, folder / "replica.sock"):
            yield engine, f"unix:{folder / 'replica.sock'}"


@pytest.mark.parametrize(
    "reason", [RejectReason.OVERLOADED, RejectReason.DEADLINE_NOW, RejectReason.DRAINING]
)
async def test_what_one_refuses_another_may_take(reason: RejectReason) -> None:
    """Whichever replica is asked first, every request is answered."""
    async with (
        a_refusing_one(Rejection(reason, "not now", retry_after_s=1.0)) as (engine, address),
        running_replica() as able,
        running_gateway([able], with_config(routing_policy="round-robin"), [address]) as stack,
    ):
        await stack.until(lambda it: all(r.state == READY for r in it.replicas))
        calls = [begin(stack, number) for number in range(4)]
        await check_whole(stack, calls)
        assert engine.requests


async def test_what_no_replica_could_take_is_asked_of_one_alone() -> None:
    """A deadline that even an idle one could not meet is answered by the first."""
    never = Rejection(RejectReason.DEADLINE_NEVER, "never", predicted_ttft_s=9.0)
    async with (
        a_refusing_one(never) as (engine, address),
        running_replica() as able,
        running_gateway([able], with_config(routing_policy="round-robin"), [address]) as stack,
    ):
        await stack.until(lambda it: all(r.state == READY for r in it.replicas))
        codes = [await code_of(begin(stack, number)) for number in range(2)]
        assert sorted(codes, key=str) == [
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.OK,
        ]
        assert len(engine.requests) == 1


# -- drained, and moved on purpose ----------------------------------------------------------------


async def test_a_drained_replica_hands_its_streams_over_and_can_come_back() -> None:
    """Control.Drain by name; the answer comes when nothing is left there; undo takes it back."""
    async with running_fleet(2) as stack:
        calls = await begin_all(stack, 6)
        drained = stack.replicas[0]
        drain = asyncio.ensure_future(
            stack.control.Drain(control_pb2.DrainRequest(replica_id=drained.replica_id))
        )
        status = await stack.until(lambda it: it.replicas[0].state == DRAINING)
        await stack.until(lambda it: it.replicas[0].num_streams == 0)
        stack.open()
        assert (await drain).num_open_requests == 0
        await check_whole(stack, calls)
        num_before = len(drained.engine.requests)
        await check_whole(stack, [begin(stack, number) for number in range(4)])
        assert len(drained.engine.requests) == num_before
        await stack.control.Drain(
            control_pb2.DrainRequest(replica_id=drained.replica_id, undo=True)
        )
        status = await stack.until(lambda it: it.replicas[0].state == READY)
        assert status.num_moved_streams >= 1


async def test_the_only_replica_keeps_its_streams_while_it_drains() -> None:
    """There is nowhere to go: they finish there, and a new call is UNAVAILABLE."""
    async with running_fleet(1) as stack:
        calls = await begin_all(stack, 2)
        drained = stack.replicas[0]
        drain = asyncio.ensure_future(
            stack.control.Drain(control_pb2.DrainRequest(replica_id=drained.replica_id))
        )
        await stack.until(lambda it: it.replicas[0].state == DRAINING)
        assert (await error_of(begin(stack, 9))).code() is grpc.StatusCode.UNAVAILABLE
        stack.open()
        await check_whole(stack, calls)
        assert (await drain).num_open_requests == 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"replica_id": "nobody"}, "replica_id is nobody; allowed: one of replica-"),
        ({"replica_id": "x" * 300}, "at most 256 bytes"),
        ({"time_limit_ms": 90_000_000}, "at most 86400000"),
        ({"undo": True}, "start it again instead"),
    ],
)
async def test_a_drain_that_cannot_be_is_refused(fields: dict[str, Any], says: str) -> None:
    """Field, value and what is allowed."""
    async with running_fleet(1) as stack:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.control.Drain(control_pb2.DrainRequest(**fields))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert says in (caught.value.details() or "")


async def test_a_drained_server_takes_nothing_and_finishes_what_runs() -> None:
    """Without a name the whole server; the answer comes with the last stream."""
    async with running_fleet(1) as stack:
        calls = await begin_all(stack, 2)
        drain = asyncio.ensure_future(stack.control.Drain(control_pb2.DrainRequest()))
        async with asyncio.timeout(PATIENCE_S):
            while await code_of(begin(stack, 9, timeout=0.3)) is not grpc.StatusCode.UNAVAILABLE:
                pass  # it came before the drain, and ended at its deadline
        stack.open()
        await check_whole(stack, calls)
        assert (await drain).num_open_requests == 0


async def test_a_request_that_waits_moves_to_a_replica_that_falls_idle() -> None:
    """Two seats, three requests: the third one waits behind the first, and runs at the second's."""
    one_seat = replace(BATCHER, max_running=1)
    async with running_fleet(2, batcher=one_seat) as stack:
        stack.hold()
        calls = [begin(stack, number) for number in range(3)]
        status = await stack.until(lambda it: sum(r.num_streams for r in it.replicas) == 3)
        busy = max(range(2), key=lambda at: status.replicas[at].num_streams)
        assert status.replicas[busy].num_streams == 2
        stack.replicas[busy].pace.allow(1)
        await stack.until(lambda it: it.replicas[busy].num_running == 1)
        stack.replicas[1 - busy].pace.open()
        await stack.until(lambda it: it.num_moved_streams >= 1)
        done = [asyncio.ensure_future(read(begun.call)) for begun in calls]
        async with asyncio.timeout(PATIENCE_S):
            while sum(it.done() for it in done) < 2:
                await asyncio.wait(
                    [it for it in done if not it.done()], return_when=asyncio.FIRST_COMPLETED
                )
        stack.open()
        for number, answer in enumerate(done):
            expected = greedy_tokens(stack.replicas[0], prompt(number), NUM_TOKENS)
            assert (await answer).token_ids() == expected
