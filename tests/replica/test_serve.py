"""`rillgate serve` as its users run it: real processes, the bundled model, signals and crashes."""

import asyncio
import re
import signal
import socket
from collections.abc import Awaitable
from pathlib import Path

import grpc
import pytest

from rillgate import AsyncClient
from rillgate_proto.v1 import inference_pb2 as pb
from rillgate_proto.v1 import inference_pb2_grpc
from tests.support.served import READY, START_S, Server, serve

DEADLINE_S = START_S

_SECRET = "RILLGATE_GATEWAY__CLUSTER_SECRET"
_SERVES_AGAIN = re.compile("replica-0 serves again")


class Caller:
    """Calls Generate, and tells how each call ended."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = inference_pb2_grpc.InferenceStub(channel)

    async def count_tokens(
        self, num_tokens: int, first: asyncio.Event | None = None, prompt: str = "What is 12 + 30?"
    ) -> int:
        """Ask for `num_tokens`; set `first` when one has arrived."""
        request = pb.GenerateRequest(
            prompt=prompt,
            stopping=pb.StoppingParams(max_tokens=num_tokens, ignore_eos=True),
        )
        num_received = 0
        async for response in self._stub.Generate(request):
            num_received += sum(len(output.token_ids) for output in response.outputs)
            if num_received and first is not None:
                first.set()
        return num_received

    async def begin(self, num_calls: int, num_tokens: int) -> "list[asyncio.Task[int]]":
        """Start calls and wait until each has a token."""
        firsts = [asyncio.Event() for _ in range(num_calls)]
        calls = [asyncio.create_task(self.count_tokens(num_tokens, first)) for first in firsts]
        async with asyncio.timeout(DEADLINE_S):
            for first in firsts:
                await first.wait()
        return calls


async def code_of(call: Awaitable[int]) -> grpc.StatusCode:
    """Return how a call ended."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.timeout(300)  # four starts of processes, two of which import torch
async def test_crashes_are_survived_and_sigterm_drains() -> None:
    """One server's life: an answer, a killed replica, a killed gateway, SIGTERM under load."""
    async with serve("--set", f"gateway.drain_grace_s={DEADLINE_S}") as server:
        address = (await server.wait_line(READY)).group(1)
        async with grpc.aio.insecure_channel(address) as channel:
            caller = Caller(channel)
            assert await caller.count_tokens(20) == 20
            await _survives_kill_of_the_replica(server, caller)
            await _survives_kill_of_the_gateway(server, caller)
            await _drains(server, caller)
        assert not [line for line in server.lines if "Traceback" in line]


async def _survives_kill_of_the_replica(server: Server, caller: Caller) -> None:
    """Streams wait for its successor and get all their tokens; the gateway's process stays."""
    calls = await caller.begin(8, 300)
    before = server.children()
    before["replica-0"].kill()
    async with asyncio.timeout(DEADLINE_S):
        assert [await call for call in calls] == [300] * 8
    await server.wait_line(re.compile("replica-0 died .killed by SIGKILL"))
    await server.wait_line(_SERVES_AGAIN)
    await _until(caller, grpc.StatusCode.OK)
    assert server.children()["gateway"].pid == before["gateway"].pid


async def _survives_kill_of_the_gateway(server: Server, caller: Caller) -> None:
    """The replica's process stays, with nothing running; port and cluster secret are the same."""
    calls = await caller.begin(2, 1500)
    before = server.children()
    secret = before["gateway"].environ()[_SECRET]
    before["gateway"].kill()
    assert {await code_of(call) for call in calls} == {grpc.StatusCode.UNAVAILABLE}
    await server.wait_line(re.compile("gateway serves again"))
    await _until(caller, grpc.StatusCode.OK)
    after = server.children()
    assert after["replica-0"].pid == before["replica-0"].pid
    assert after["gateway"].environ()[_SECRET] == secret
    assert len(secret) == 64
    assert after["replica-0"].environ()[_SECRET] == ""
    assert not [line for line in server.lines if secret in line]


async def _drains(server: Server, caller: Caller) -> None:
    """Open streams get all of their tokens, a new call UNAVAILABLE; exit 0, nobody is left."""
    calls = await caller.begin(4, 300)
    children = server.children()
    server.process.send_signal(signal.SIGTERM)
    await _until(caller, grpc.StatusCode.UNAVAILABLE)
    assert [await call for call in calls] == [300] * 4
    assert await server.wait_exit() == 0
    assert not [child for child in children.values() if child.is_running()]


async def _until(caller: Caller, wanted: grpc.StatusCode) -> None:
    """Call until the answer is `wanted`; until then it must be the other of OK and UNAVAILABLE."""
    async with asyncio.timeout(DEADLINE_S):
        while (code := await code_of(caller.count_tokens(1))) is not wanted:
            assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)


@pytest.mark.timeout(300)  # three starts of processes that import torch
async def test_of_two_replicas_one_is_killed_and_comes_back() -> None:
    """The other one and the gateway keep their processes; SIGTERM leaves nobody."""
    async with serve("--replicas", "2", "--devices", "cpu") as server:
        address = (await server.wait_line(READY)).group(1)
        for name in ("replica-0", "replica-1"):
            await server.wait_line(re.compile(f"{name}: cpu with . thread"))
            await server.wait_line(re.compile(f"{name} serves$"))
        before = server.children()
        assert sorted(before) == ["gateway", "replica-0", "replica-1"]
        before["replica-1"].kill()
        await server.wait_line(re.compile("replica-1 died .killed by SIGKILL"))
        await server.wait_line(re.compile("replica-1 serves again"))
        after = server.children()
        assert [name for name in before if before[name].pid != after[name].pid] == ["replica-1"]
        async with grpc.aio.insecure_channel(address) as channel:
            assert await Caller(channel).count_tokens(20) == 20
        server.process.send_signal(signal.SIGTERM)
        assert await server.wait_exit() == 0
        assert not [child for child in after.values() if child.is_running()]
        assert len([line for line in server.lines if READY.search(line)]) == 1


async def test_two_tiers_are_served_as_configured() -> None:
    """Answers and prompts that do not fit the device tier go through the host tier, checked."""
    settings = (
        *("model.max_context_tokens=256", "cache.kv_dtype=int8", "cache.audit=true"),
        *("cache.device_memory=300KB", "cache.host_memory=2MB", "cache.load_policy=load"),
    )
    async with serve(*(part for setting in settings for part in ("--set", setting))) as server:
        address = (await server.wait_line(READY)).group(1)
        async with grpc.aio.insecure_channel(address) as channel, AsyncClient(address) as client:
            caller = Caller(channel)
            prompts = [f"What is {summand} + 30? " * 8 for summand in range(6)]
            for _ in range(2):  # the second finds in the host tier what the first left there
                calls = [caller.count_tokens(100, prompt=prompt) for prompt in prompts]
                assert await asyncio.gather(*calls) == [100] * 6
            assert [model.max_context_tokens for model in await client.models()] == [256]
            assert await code_of(caller.count_tokens(256)) is grpc.StatusCode.INVALID_ARGUMENT
            (replica,) = (await client.status()).replicas
        assert 16 <= replica.device.num_blocks < 2 * 16  # one full context, and not two
        assert replica.host.num_blocks > 6 * replica.device.num_blocks
        assert replica.copies.num_stored_blocks > 0
        assert replica.copies.num_loaded_blocks > 0
        assert (replica.copies.num_failed_blocks, replica.copies.num_refused_blocks) == (0, 0)


async def test_a_bad_checkpoint_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """No traceback, no second line, no child left."""
    async with serve("--model", str(tmp_path)) as server:
        assert await server.wait_exit() == 2
        (line,) = server.lines
        assert line == f"rillgate: {tmp_path} has no config.json"


async def test_a_port_in_use_is_one_line_and_exit_code_2() -> None:
    """The gateway finds out; the replica, still loading, is not left behind."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with serve("--listen", address) as server:
            assert await server.wait_exit() == 2
            (line,) = server.lines
            assert line.startswith(f"rillgate: gateway.listen is '{address}'")


async def test_a_cache_that_does_not_fit_says_needed_and_free() -> None:
    """The replica finds out, the supervisor ends with its line and exit code 2."""
    async with serve("--set", f"cache.device_memory={1 << 49}") as server:
        assert await server.wait_exit() == 2
        said = [line for line in server.lines if line.startswith("rillgate: ")]
        assert len(said) == 1
        assert re.search(r"needs 524288\.00 GiB .* free: \d+\.\d\d GiB", said[0])


async def test_a_tier_below_one_request_of_the_context_length_is_one_line() -> None:
    """It says what is given, what is needed, and which setting asks for less."""
    async with serve("--set", "cache.device_memory=1MB") as server:
        assert await server.wait_exit() == 2
        (said,) = [line for line in server.lines if line.startswith("rillgate: ")]
        assert "cache.device_memory is '1MB': " in said
        assert re.search(
            r"2048 tokens, needs 128 blocks, \d+ bytes; .* model\.max_context_tok", said
        )
