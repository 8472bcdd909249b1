"""A gateway over replicas in processes of their own: through the TCP door, and as they go down."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from rillgate import AsyncClient
from rillgate.status_types import ReplicaState, ServerStatus
from rillgate_proto.v1 import inference_pb2 as pb
from rillgate_proto.v1 import inference_pb2_grpc
from rillgate_server.config.groups import LinkConfig
from rillgate_server.core.clock import SystemClock
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.engine.testing import FakeModel
from rillgate_server.gateway.process import Gateway
from tests.gateway.stack import (
    GATEWAY,
    PATIENCE_S,
    Answer,
    open_channel,
    read,
    request,
    served_model,
)
from tests.replica.engine_server import socket_directory
from tests.support.link_tls import GATEWAY_TLS, REPLICA_TLS

TOKEN = "known on both sides"
NUM_STREAMS = 8
NUM_TOKENS = 200
MIN_STEP_MS = 20.0
"""So that a stream lasts for four seconds at least."""
_POLL_S = 0.02
LONG_GRACE_S = 600.0
"""Longer than any test may take: who ends sooner did not wait for it."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where sockets are."""
    with socket_directory() as directory:
        yield directory


@dataclass
class Replica:
    """A replica's process."""

    process: Process
    address: str

    async def exit_code(self) -> int:
        """Wait for the end."""
        return await asyncio.wait_for(self.process.wait(), PATIENCE_S)


@contextlib.asynccontextmanager
async def running_replica(
    door: Mapping[str, object], link: Mapping[str, object] | None = None
) -> AsyncIterator[Replica]:
    """Start a replica, wait for READY, and leave nothing behind."""
    settings = {"replica": {"min_step_ms": MIN_STEP_MS, **door}, "link": link or {}}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.gateway.fake_replica", json.dumps(settings)),
        stdout=PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
    )
    try:
        address = f"unix:{door.get('socket')}"
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            while not (line := (await process.stdout.readline()).decode()).startswith("READY"):
                assert line, "it ended before READY"
                address = line.partition("LISTENING ")[2].strip()
        yield Replica(process, address)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


@dataclass
class Served:
    """A gateway in this process, and what calls it."""

    inference: inference_pb2_grpc.InferenceStub
    client: AsyncClient

    async def until(self, condition: Callable[[ServerStatus], bool]) -> ServerStatus:
        """Ask for the status until it is as wanted."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                status = await self.client.status()
                if condition(status):
                    return status
                await asyncio.sleep(_POLL_S)


@contextlib.asynccontextmanager
async def running_gateway(
    addresses: Sequence[str], door: LinkConfig | None = None
) -> AsyncIterator[Served]:
    """Serve over the replicas at `addresses`."""
    config = replace(GATEWAY, replica_addresses=tuple(addresses))
    gateway = Gateway(config, served_model(), SystemClock(), door=door or LinkConfig())
    await gateway.start()
    try:
        async with (
            open_channel(gateway.address) as channel,
            AsyncClient(gateway.address) as client,
        ):
            yield Served(inference_pb2_grpc.InferenceStub(channel), client)
    finally:
        await gateway.stop()


class Stream:
    """One request under way."""

    def __init__(self, served: Served, prompt: Sequence[int]) -> None:
        self._prompt = tuple(prompt)
        self._call = served.inference.Generate(
            request(tokens=prompt, stopping__max_tokens=NUM_TOKENS, stopping__ignore_eos=True)
        )
        self._messages: list[pb.GenerateResponse] = []
        self._rest: asyncio.Task[Answer] | None = None

    async def begin(self) -> None:
        """Wait for a token, and read on from there."""
        async with asyncio.timeout(PATIENCE_S):
            while not (self._messages and self._messages[-1].outputs):
                message = await self._call.read()
                assert isinstance(message, pb.GenerateResponse)
                self._messages.append(message)
        self._rest = asyncio.create_task(read(self._call))

    @property
    def is_over(self) -> bool:
        """Whether the last token is there, or an error."""
        return self._rest is not None and self._rest.done()

    async def check(self) -> None:
        """Read to the end: each token once, in order, and the right one."""
        assert self._rest is not None
        answer = Answer(self._messages + (await self._rest).messages)
        assert answer.token_ids() == expected_tokens(self._prompt)
        assert answer.outputs()[0].token_offset == 0
        assert answer.finished().reason == pb.FINISH_REASON_LENGTH


def expected_tokens(prompt: Sequence[int]) -> list[int]:
    """Say what a fake replica answers greedily."""
    model, context = FakeModel(served_model().spec.vocab_size), list(prompt)
    for _ in range(NUM_TOKENS):
        context.append(model.next_token(context, len(prompt), SamplingParams(0, 0.0), 0))
    return context[len(prompt) :]


async def begin_streams(served: Served, num_streams: int) -> list[Stream]:
    """Start streams with prompts of their own, and wait until each has a token."""
    streams = [Stream(served, (5, 6, 7 + index)) for index in range(num_streams)]
    for stream in streams:
        await stream.begin()
    return streams


def num_ready(status: ServerStatus) -> int:
    """Count the replicas that serve."""
    return sum(it.state is ReplicaState.READY for it in status.replicas)


async def test_a_gateway_over_a_replica_behind_certificates_and_a_token() -> None:
    """The replica says where it listens and bears its name; answers come through the door."""
    replica_door = {
        "tls_certificate": REPLICA_TLS.tls_certificate,
        "tls_key": REPLICA_TLS.tls_key,
        "tls_authority": REPLICA_TLS.tls_authority,
        "token": TOKEN,
    }
    async with (
        running_replica({"listen": "127.0.0.1:0", "name": "far"}, replica_door) as replica,
        running_gateway([replica.address], replace(GATEWAY_TLS, token=TOKEN)) as served,
    ):
        status = await served.until(lambda it: num_ready(it) == 1)
        assert (status.replicas[0].replica_id, status.replicas[0].address) == (
            "far",
            replica.address,
        )
        (stream,) = await begin_streams(served, 1)
        await stream.check()


async def test_sigterm_moves_streams_at_once_and_ends_the_replica(folder: Path) -> None:
    """It exits with 0 while its streams go on at the other one, each token once."""
    doors = [
        {"socket": str(folder / f"{name}.sock"), "name": name, "drain_grace_s": LONG_GRACE_S}
        for name in ("staying", "going")
    ]
    async with (
        running_replica(doors[0]) as staying,
        running_replica(doors[1]) as going,
        running_gateway([staying.address, going.address]) as served,
    ):
        await served.until(lambda it: num_ready(it) == 2)
        streams = await begin_streams(served, NUM_STREAMS)
        status = await served.client.status()
        num_there = status.replicas[1].num_streams
        assert num_there > 0
        going.process.send_signal(signal.SIGTERM)
        assert await going.exit_code() == 0
        assert not any(stream.is_over for stream in streams)
        status = await served.client.status()
        assert status.num_moved_streams == num_there
        for stream in streams:
            await stream.check()


async def test_past_its_grace_a_replica_leaves_its_streams_to_the_next_one(folder: Path) -> None:
    """Cut off is not failed: the streams wait, and go on where another replica comes up."""
    first, second = (str(folder / f"{name}.sock") for name in ("first", "second"))
    async with running_gateway([f"unix:{first}", f"unix:{second}"]) as served:
        async with running_replica({"socket": first, "drain_grace_s": 0.1}) as replica:
            await served.until(lambda it: num_ready(it) == 1)
            streams = await begin_streams(served, 2)
            replica.process.send_signal(signal.SIGTERM)
            assert await replica.exit_code() == 0
        assert not any(stream.is_over for stream in streams)
        async with running_replica({"socket": second}):
            for stream in streams:
                await stream.check()
