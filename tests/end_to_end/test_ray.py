"""Replicas on a Ray cluster: real nodes on this machine, the bundled model in float32.

Whatever part of a replica is killed, each stream hears what it would have heard in peace, and
another replica takes the place.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import psutil
import pytest

from rillgate import AsyncClient
from rillgate.status_types import ReplicaState, ServerStatus
from tests.support.crowd import Crowd, undisturbed
from tests.support.ray_cluster import RayNode, lives, ray_node, start_here, until, why_no_ray
from tests.support.served import READY, START_S, Server, serve

MIN_HIT = 4
"""Streams with a token that a break must hit to count."""
_POLL_S = 0.05
_FLAGS = (
    *("--cluster", "ray", "--replicas", "2", "--dtype", "float32"),
    *("--set", "replica.min_step_ms=20", "--set", "serve.ray_lease_s=3"),
    *("--set", "gateway.failover_wait_s=90"),
)

pytestmark = [
    pytest.mark.skipif(bool(why_no_ray()), reason=why_no_ray() or "-"),
    pytest.mark.timeout(300),
]


@dataclass
class Stage:
    """A served cluster under streams."""

    server: Server
    client: AsyncClient
    crowd: Crowd

    async def status(self, condition: Callable[[ServerStatus], bool]) -> ServerStatus:
        """Ask until it is as wanted."""
        async with asyncio.timeout(START_S):
            while True:
                status = await self.client.status()
                if condition(status):
                    return status
                await asyncio.sleep(_POLL_S)

    async def serves(self) -> None:
        """Wait for both replicas."""
        await self.status(lambda it: num_ready(it) == 2)

    async def lose(self, node: RayNode, choose: Callable[[psutil.Process], psutil.Process]) -> None:
        """Kill what `choose` says for the replica on a node, under streams, and wait until it is
        gone and replaced."""
        ((name, replica),) = node.replicas().items()

        def is_worth_it(status: ServerStatus) -> bool:
            streams = {it.replica_id: it.num_streams for it in status.replicas}
            return streams.get(name, 0) - self.crowd.num_without_token > MIN_HIT

        before = (await self.status(is_worth_it)).num_moved_streams
        choose(replica).kill()
        await self.status(lambda it: it.num_moved_streams - before >= MIN_HIT)
        await until(lambda: not lives(replica))
        await self.serves()


def num_ready(status: ServerStatus) -> int:
    """Count the replicas that serve."""
    return sum(it.state is ReplicaState.READY for it in status.replicas)


@asynccontextmanager
async def _node(*flags: str) -> AsyncIterator[RayNode]:
    """Start a node with room for one replica."""
    async with ray_node(start_here, "--num-cpus=1", *flags) as node:
        yield node


@asynccontextmanager
async def _served(head: RayNode) -> AsyncIterator[Stage]:
    """Serve two replicas on the cluster; both are there."""
    async with serve(*_FLAGS, "--ray-address", head.address) as server:
        address = (await server.wait_line(READY)).group(1)
        async with AsyncClient(address) as client:
            stage = Stage(server, client, Crowd([client], []))
            await stage.serves()
            stage.crowd = Crowd([client], await undisturbed(client))
            yield stage


async def test_lost_replicas_are_replaced_and_streams_go_on() -> None:
    """A process, its actor and a node are killed in turn; then the driver stands still, and nobody
    renews any lease."""
    async with AsyncExitStack() as nodes:
        head = await nodes.enter_async_context(_node("--head", "--port=0"))
        other = await nodes.enter_async_context(_node(f"--address={head.address}"))
        stage = await nodes.enter_async_context(_served(head))
        async with stage.crowd.running_streams():
            await stage.lose(other, lambda replica: replica)
            await stage.lose(other, lambda replica: replica.parent() or replica)
            spare = await nodes.enter_async_context(_node(f"--address={head.address}"))
            await stage.lose(other, lambda replica: other.raylet())
            await _driver_stands_still(stage, head, spare)
        assert stage.crowd.differences() == []
        await stage.status(lambda it: it.num_blocks_used == 0)
        await _ends_in_order(stage.server, head, spare)


async def _driver_stands_still(stage: Stage, *nodes: RayNode) -> None:
    """Without renewals every replica is killed where it is; streams wait until they are back."""
    replicas = [it for node in nodes for it in node.replicas().values()]
    assert len(replicas) == 2
    stage.server.process.send_signal(signal.SIGSTOP)
    try:
        await until(lambda: not any(map(lives, replicas)))
    finally:
        stage.server.process.send_signal(signal.SIGCONT)
    await stage.serves()


async def _ends_in_order(server: Server, *nodes: RayNode) -> None:
    """SIGTERM leaves neither replica nor actor; the cluster is as it was."""
    replicas = [it for node in nodes for it in node.replicas().values()]
    assert len(replicas) == 2
    server.process.send_signal(signal.SIGTERM)
    assert await server.wait_exit() == 0
    await until(lambda: not any(map(lives, replicas)))
    await until(lambda: not any(node.hosts() for node in nodes))
    assert all(lives(node.raylet()) for node in nodes)
