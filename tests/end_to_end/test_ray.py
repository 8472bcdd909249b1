"""Replicas on a Ray cluster: real nodes on this machine, the bundled model in float32.

Whatever part of a replica is killed, each stream hears what it would have heard in peace, and
another replica takes the place.
"""

import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import psutil
import pytest

from rillgate import AsyncClient
from tests.support.ray_cluster import RayNode, lives, ray_node, start_here, until, why_no_ray
from tests.support.ray_stage import FLAGS, RayStage
from tests.support.served import READY, serve

pytestmark = [
    pytest.mark.skipif(bool(why_no_ray()), reason=why_no_ray() or "-"),
    pytest.mark.timeout(300),
]


@asynccontextmanager
async def _node(*flags: str) -> AsyncIterator[RayNode]:
    """Start a node with room for one replica."""
    async with ray_node(start_here, "--num-cpus=1", *flags) as node:
        yield node


@asynccontextmanager
async def _served(head: RayNode) -> AsyncIterator[RayStage]:
    """Serve two replicas on the cluster."""
    own = ("--ray-address", head.address, "--set", "serve.ray_lease_s=3")
    async with serve(*FLAGS, *own) as server:
        address = (await server.wait_line(READY)).group(1)
        async with AsyncClient(address) as client:
            yield await RayStage.open(server, client)


async def test_lost_replicas_are_replaced_and_streams_go_on() -> None:
    """A process, its actor and a node are killed in turn; then the driver stands still, and nobody
    renews any lease."""
    async with AsyncExitStack() as nodes:
        head = await nodes.enter_async_context(_node("--head", "--port=0"))
        other = await nodes.enter_async_context(_node(f"--address={head.address}"))
        stage = await nodes.enter_async_context(_served(head))
        async with stage.crowd.running_streams():
            await _lose(stage, other, lambda replica: replica)
            await _lose(stage, other, lambda replica: replica.parent() or replica)
            spare = await nodes.enter_async_context(_node(f"--address={head.address}"))
            await _lose(stage, other, lambda replica: other.raylet())
            await _driver_stands_still(stage, head, spare)
        await stage.check()
        await _ends_in_order(stage, head, spare)


async def _lose(
    stage: RayStage, node: RayNode, choose: Callable[[psutil.Process], psutil.Process]
) -> None:
    """Kill what `choose` says for the replica on a node, under streams, and wait until it is gone
    and replaced."""
    ((name, replica),) = node.replicas().items()
    before = await stage.is_worth_it(name)
    choose(replica).kill()
    await stage.were_moved(before)
    await until(lambda: not lives(replica))
    await stage.serves()


async def _driver_stands_still(stage: RayStage, *nodes: RayNode) -> None:
    """Without renewals every replica is killed where it is; streams wait until they are back."""
    replicas = [it for node in nodes for it in node.replicas().values()]
    assert len(replicas) == 2
    stage.server.process.send_signal(signal.SIGSTOP)
    try:
        await until(lambda: not any(map(lives, replicas)))
    finally:
        stage.server.process.send_signal(signal.SIGCONT)
    await stage.serves()


async def _ends_in_order(stage: RayStage, *nodes: RayNode) -> None:
    """SIGTERM leaves neither replica nor actor; the cluster is as it was."""
    replicas = [it for node in nodes for it in node.replicas().values()]
    assert len(replicas) == 2
    stage.server.process.send_signal(signal.SIGTERM)
    assert await stage.server.wait_exit() == 0
    await until(lambda: not any(map(lives, replicas)))
    await until(lambda: not any(node.hosts() for node in nodes))
    assert all(lives(node.raylet()) for node in nodes)
