"""Streams survive: real processes, three replicas of the bundled model under 24 streams.

Every stream's tokens, text, log-probabilities and end are those of the undisturbed server, each
token once and in order, none errored, and no block is held at the end, whatever is broken meanwhile
and however often. A break counts only where it hit at least four streams that had a token and were
not over. `make test-long` breaks things twenty times instead of four, and writes down what it saw.
"""

import asyncio
import os
import random
import re
import signal
import statistics
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from benchmarks.results_file import write_results
from rillgate import AsyncClient
from rillgate.status_types import ReplicaState, ReplicaStatus, ServerStatus
from rillgate_server.replica.restarts import RestartPolicy
from tests.client.cutting_proxy import CuttingProxy
from tests.end_to_end.faulty_gateway import FAULTS
from tests.support.crowd import Crowd, Heard, undisturbed
from tests.support.served import GATEWAY, READY, START_S, Server, serve

NUM_BREAKS = int(os.environ.get("RILLGATE_SURVIVAL_BREAKS", "4"))
RESULTS = os.environ.get("RILLGATE_SURVIVAL_RESULTS", "")
"""Name of the file under benchmarks/results to write what happened to; empty: none."""
ROWS: list[dict[str, Any]] = []  # Any: JSON
"""Of that file, a scenario each."""
MIN_HIT = 4
"""Streams that a break must hit to count."""
NUM_REPLICAS = 3
POLICY = RestartPolicy()
SERVES_AGAIN = re.compile("gateway serves again")
_POLL_S = 0.03

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(120 + 30 * NUM_BREAKS),
]


@dataclass
class Served:
    """The server, and what it answers in peace."""

    server: Server
    address: str
    client: AsyncClient
    expected: list[Heard]

    def kill(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a child."""
        self.server.children()[name].send_signal(number)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served() -> AsyncIterator[Served]:
    """Three replicas, in float32, slow enough that streams last."""
    flags = ("--replicas", str(NUM_REPLICAS), "--dtype", "float32")
    async with serve(*flags, "--set", "replica.min_step_ms=20") as server:
        address = (await server.wait_line(READY)).group(1)
        async with AsyncClient(address) as client:
            await _until(client, lambda status: len(_ready(status)) == NUM_REPLICAS)
            yield Served(server, address, client, await undisturbed(client))


async def _until(client: AsyncClient, condition: Callable[[ServerStatus], bool]) -> ServerStatus:
    """Ask for the status until it is as wanted; the gateway may be away meanwhile."""
    async with asyncio.timeout(START_S):
        while True:
            status = await client.status()
            if condition(status):
                return status
            await asyncio.sleep(_POLL_S)


def _ready(status: ServerStatus) -> list[ReplicaStatus]:
    return [it for it in status.replicas if it.state is ReplicaState.READY]


def _name(replica: ReplicaStatus) -> str:
    """Return the name of the process, which its socket has too."""
    return Path(replica.address.removeprefix("unix:")).stem


async def _pick(served: Served, crowd: Crowd, rng: random.Random) -> tuple[ReplicaStatus, int]:
    """Wait for a replica with enough streams, beside another one; return the moves so far, too."""
    await asyncio.sleep(rng.uniform(0.1, 0.8))

    def is_worth_it(replica: ReplicaStatus) -> bool:
        return replica.num_streams - crowd.num_without_token >= MIN_HIT + 1

    status = await _until(
        served.client,
        lambda it: len(_ready(it)) >= 2 and any(map(is_worth_it, _ready(it))),
    )
    return rng.choice([it for it in _ready(status) if is_worth_it(it)]), status.num_moved_streams


async def _moved(served: Served, victim: ReplicaStatus, before: int) -> int:
    """Wait until the gateway has taken a victim's streams elsewhere; return how many they were."""

    def is_empty(status: ServerStatus) -> bool:
        (replica,) = (it for it in status.replicas if it.address == victim.address)
        return status.num_moved_streams > before and replica.num_streams == 0

    return (await _until(served.client, is_empty)).num_moved_streams - before


# -- what is broken -------------------------------------------------------------------------------


async def _kill(served: Served, crowd: Crowd, rng: random.Random) -> int:
    """Kill a replica; return how many streams with a token that hit."""
    victim, before = await _pick(served, crowd, rng)
    num_without = crowd.num_without_token
    served.kill(_name(victim), signal.SIGKILL)
    return await _moved(served, victim, before) - num_without


async def _stop(served: Served, crowd: Crowd, rng: random.Random) -> int:
    """Stop a replica, let it go on later, and wait until it is used again."""
    victim, before = await _pick(served, crowd, rng)
    num_without = crowd.num_without_token
    served.kill(_name(victim), signal.SIGSTOP)
    try:
        num_hit = await _moved(served, victim, before) - num_without
        await asyncio.sleep(rng.uniform(0.1, 1.0))
    finally:
        served.kill(_name(victim), signal.SIGCONT)
    await _until(served.client, lambda it: victim.address in {r.address for r in _ready(it)})
    return num_hit


async def _drain(served: Served, crowd: Crowd, rng: random.Random) -> int:
    """Take a replica out of service, and back."""
    victim, before = await _pick(served, crowd, rng)
    num_without = crowd.num_without_token
    await served.client.drain(victim.replica_id, time_limit_s=START_S)
    num_hit = await _moved(served, victim, before) - num_without
    await served.client.drain(victim.replica_id, undo=True)
    await _until(served.client, lambda it: victim.address in {r.address for r in _ready(it)})
    return num_hit


async def _restart_gateway(served: Served, crowd: Crowd, rng: random.Random) -> int:
    """Kill the gateway; return how many streams with a token that hit.

    The server gives up when it dies five times in a row within its first 30 s, so one life of
    four is longer.
    """
    num_lives = sum(map(bool, map(SERVES_AGAIN.search, served.server.lines)))
    is_long = num_lives and num_lives % (POLICY.max_quick_crashes - 1) == 0
    await asyncio.sleep(POLICY.quick_s if is_long else rng.uniform(0.5, 2.0))
    await crowd.wait_until(lambda: crowd.num_with_token >= NUM_REPLICAS * MIN_HIT)
    num_lines = len(served.server.lines)
    num_hit = crowd.num_with_token
    served.kill(GATEWAY, signal.SIGKILL)
    await served.server.wait_line(SERVES_AGAIN, num_lines)
    return num_hit


Break = Callable[[Served, Crowd, random.Random], Awaitable[int]]
BREAKS: dict[str, Break] = {
    "kill": _kill,
    "stop": _stop,
    "drain": _drain,
    "gateway": _restart_gateway,
}


@pytest.mark.parametrize("what", BREAKS)
async def test_streams_survive(served: Served, what: str) -> None:
    """Whatever is broken under them, each hears what it would have heard in peace."""
    crowd, rng = Crowd([served.client], served.expected), random.Random(f"{what} 1")
    hits = []
    async with crowd.running_streams():
        for _ in range(NUM_BREAKS):
            hits.append(await BREAKS[what](served, crowd, rng))
    assert min(hits) >= MIN_HIT, hits
    await _check(served, crowd)
    if what == "gateway":
        # Less than `hits`: the end of some was on its way when the gateway was killed.
        assert _num_resumes(crowd) >= NUM_BREAKS * MIN_HIT
    _write(what, hits, crowd)


async def test_streams_survive_a_proxy_that_cuts_connections(served: Served) -> None:
    """Four connections of six streams each, every one cut at a random byte, again and again."""
    async with AsyncExitStack() as stack:
        proxy = stack.enter_context(CuttingProxy(served.address, seed=5, max_bytes=40_000))
        clients = [await stack.enter_async_context(AsyncClient(proxy.target)) for _ in range(4)]
        crowd = Crowd(clients, served.expected)
        async with crowd.running_streams(), asyncio.timeout(START_S * 2):
            await crowd.wait_until(lambda: _num_resumes(crowd) >= NUM_BREAKS * MIN_HIT)
            await crowd.wait_until(lambda: proxy.num_cuts >= NUM_BREAKS)
        await _check(served, crowd)
        _write("proxy", [proxy.num_cuts], crowd)


def _num_resumes(crowd: Crowd) -> int:
    return sum(heard.num_resumes for heard, _ in crowd.done)


async def _check(served: Served, crowd: Crowd) -> None:
    """Prove that every stream was whole, and that nothing is held afterwards."""
    assert len(crowd.done) >= len(served.expected)
    assert crowd.differences() == []
    status = await _until(served.client, lambda it: it.num_blocks_used == 0)
    assert status.num_open_requests == 0
    assert not [line for line in served.server.lines if "Traceback" in line]


def _write(what: str, hits: Sequence[int], crowd: Crowd) -> None:
    """Add a scenario to the results, if anybody wants them."""
    if not RESULTS:
        return
    pauses = [max(heard.pauses_s, default=0.0) for heard, _ in crowd.done]
    ROWS.append(
        {
            "what": what,
            "unit": "streams with a token that a break hit (proxy: connections cut)",
            "samples": list(hits),
            "breaks": NUM_BREAKS,
            "streams": len(crowd.done),
            "tokens": sum(len(it.token_ids) for h, _ in crowd.done for it in h.choices.values()),
            "resumes": _num_resumes(crowd),
            "wrong_streams": 0,
            "longest_pause_s": {
                "median": round(statistics.median(pauses), 3),
                "max": round(max(pauses), 3),
            },
        }
    )
    write_results(RESULTS, "make test-long", ROWS, {})


# -- the test of the test -------------------------------------------------------------------------


@asynccontextmanager
async def _faulty_gateway(served: Served, fault: str) -> AsyncIterator[str]:
    """Run a gateway with a planted fault over the same replicas; yield its address."""
    replicas = (await served.client.status()).replicas
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.end_to_end.faulty_gateway", fault),
        *("--listen", "127.0.0.1:0"),
        *(part for it in replicas for part in ("--replica-address", it.address)),
        stdout=PIPE,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), START_S)
        yield line.decode().split()[1]
    finally:
        process.kill()
        await process.wait()


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_planted_fault_would_be_seen(served: Served, fault: str) -> None:
    """The same streams over a gateway that errs after a move: the same check finds them."""
    async with _faulty_gateway(served, fault) as address, AsyncClient(address) as client:
        faulty = Served(served.server, address, client, served.expected)
        crowd = Crowd([client], served.expected)
        async with crowd.running_streams():
            assert await _drain(faulty, crowd, random.Random(fault)) >= MIN_HIT
        found = crowd.differences()
    assert found
    assert not any("Error" in it for it in found)  # seen by comparing, not by an accident
