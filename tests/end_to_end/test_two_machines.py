"""Replicas on two machines: network namespaces joined by a cable that is cut and mended.

Real processes and the bundled model in float32: whatever the cable does, each stream hears what it
would have heard in peace (tests.support.crowd).
"""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rillgate import AsyncClient
from rillgate.status_types import ReplicaState, ServerStatus
from tests.support.crowd import Crowd, undisturbed
from tests.support.served import START_S
from tests.support.two_machines import (
    Machine,
    TwoMachines,
    client_on,
    two_machines,
    wait_line,
    why_not,
)

_TOKEN = "between two machines, 1"
_ENVIRONMENT = {
    "RILLGATE_LINK__TOKEN": _TOKEN,
    "RILLGATE_MODEL__DTYPE": "float32",
    "RILLGATE_REPLICA__NUM_THREADS": "1",
    "RILLGATE_REPLICA__MIN_STEP_MS": "20",
    "OMP_NUM_THREADS": "1",
}
_PORT = 50061
_POLL_S = 0.05

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
    pytest.mark.timeout(300),
]


@pytest.fixture
def machines() -> Iterator[TwoMachines]:
    """Two machines for one test."""
    with two_machines() as it:
        yield it


def _start(machine: Machine, *command: str) -> "subprocess.Popen[str]":
    """Start one of the server's commands."""
    return machine.start(
        sys.executable, "-m", "rillgate_server.cli", *command, environment=_ENVIRONMENT
    )


async def _until(client: AsyncClient, condition: Callable[[ServerStatus], bool]) -> ServerStatus:
    async with asyncio.timeout(START_S):
        while True:
            status = await client.status()
            if condition(status):
                return status
            await asyncio.sleep(_POLL_S)


def _num_ready(status: ServerStatus) -> int:
    return sum(it.state is ReplicaState.READY for it in status.replicas)


async def test_a_cut_cable_costs_a_pause(machines: TwoMachines, tmp_path: Path) -> None:
    """The far replica's streams go on at the near one; mended, the far one is used again."""
    near, far = (f"{it.address}:{_PORT}" for it in (machines.a, machines.b))
    replicas = [
        _start(machine, "replica", "--listen", address)
        for machine, address in ((machines.a, near), (machines.b, far))
    ]
    for replica in replicas:
        await wait_line(replica, "^READY")
    gateway = _start(
        *(machines.a, "gateway", "--listen", "127.0.0.1:0"),
        *("--replica-address", near, "--replica-address", far),
    )
    address = (await wait_line(gateway, r"^READY (\S+)")).group(1)
    async with client_on(machines.a, address, tmp_path) as client:
        await _until(client, lambda status: _num_ready(status) == 2)
        crowd = Crowd([client], await undisturbed(client))
        async with crowd.running_streams():
            for _ in range(2):
                status = await _until(client, lambda it: it.replicas[1].num_streams >= 5)
                before = status.num_moved_streams
                machines.cut()
                status = await _until(client, lambda it: _num_ready(it) == 1)
                assert status.num_moved_streams - before >= 4
                machines.restore()
                await _until(client, lambda it: _num_ready(it) == 2)
        assert crowd.differences() == []
        # The far replica has ended the requests that nobody waits for any more.
        await _until(client, lambda it: it.num_blocks_used == 0)


def _start_split(machines: TwoMachines, port: int) -> list["subprocess.Popen[str]"]:
    """Start one replica whose two ranks are on different machines; rank 0 has the door."""
    ranks = ("--ranks", "2", "--rendezvous", f"{machines.a.address}:{port}")
    door = ("--listen", f"{machines.a.address}:{_PORT}")
    return [
        _start(machines.a, "replica", "--rank", "0", *ranks, *door),
        _start(machines.b, "replica", "--rank", "1", *ranks),
    ]


async def test_a_replica_split_over_both_machines(machines: TwoMachines, tmp_path: Path) -> None:
    """Its answers are right; with the cable cut both of its processes end, and started again (as a
    supervisor would) it goes on with the streams that waited."""
    split = _start_split(machines, 29500)
    for rank in split:
        await wait_line(rank, "^READY")
    gateway = _start(
        *(machines.a, "gateway", "--listen", "127.0.0.1:0"),
        *("--replica-address", f"{machines.a.address}:{_PORT}"),
        *("--set", "gateway.failover_wait_s=60"),
    )
    address = (await wait_line(gateway, r"^READY (\S+)")).group(1)
    async with client_on(machines.a, address, tmp_path) as client:
        status = await _until(client, lambda it: _num_ready(it) == 1)
        assert status.replicas[0].tensor_parallel_size == 2
        crowd = Crowd([client], await undisturbed(client))
        async with crowd.running_streams():
            await crowd.wait_until(lambda: crowd.num_with_token >= 4)
            machines.cut()
            async with asyncio.timeout(START_S):
                codes = [await asyncio.to_thread(rank.wait) for rank in split]
            assert all(code != 0 for code in codes)
            machines.restore()
            for rank in _start_split(machines, 29501):
                await wait_line(rank, "^READY")
        assert crowd.differences() == []
        await _until(client, lambda it: it.num_blocks_used == 0)
