"""Replicas on a Ray cluster over two machines: network namespaces, a cable that is cut and mended.

Real nodes and the bundled model in float32. What was cut off is dead before another one serves in
its place, and no stream notices more than a pause.
"""

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from tests.support.ray_cluster import RayNode, lives, ray_node, until, why_no_ray
from tests.support.ray_stage import FLAGS, RayStage
from tests.support.served import READY, serve
from tests.support.two_machines import Machine, TwoMachines, client_on, two_machines, why_not

_MISSING = why_no_ray() or why_not()

pytestmark = [
    pytest.mark.skipif(bool(_MISSING), reason=_MISSING or "-"),
    pytest.mark.timeout(300),
]


@asynccontextmanager
async def _node(machine: Machine, *flags: str) -> AsyncIterator[RayNode]:
    """Start a node with room for one replica."""
    own = ("--num-cpus=1", f"--node-ip-address={machine.address}")
    async with ray_node(machine.start, *own, *flags) as node:
        yield node


@asynccontextmanager
async def _served(machine: Machine, head: RayNode, folder: Path) -> AsyncIterator[RayStage]:
    """Serve two replicas on the cluster, from one of its machines."""
    # Longer than Ray takes to notice: a replacement that did not wait would start first.
    own = ("--ray-address", head.address, "--set", "serve.ray_lease_s=9")
    async with serve(*FLAGS, *own, through=machine.command()) as server:
        address = (await server.wait_line(READY)).group(1)
        async with client_on(machine, address, folder) as client:
            yield await RayStage.open(server, client)


async def test_what_a_cut_cable_isolates_is_dead_before_its_replacement_serves(
    tmp_path: Path,
) -> None:
    """Its streams finish elsewhere; once mended the far machine is used again."""
    async with AsyncExitStack() as stack:
        machines = stack.enter_context(two_machines())
        near, far = machines.a, machines.b
        head = await stack.enter_async_context(_node(near, "--head", "--port=0"))
        joins = f"--address={head.address}"
        cut_off = await stack.enter_async_context(_node(far, joins))
        stage = await stack.enter_async_context(_served(near, head, tmp_path))
        spare = await stack.enter_async_context(_node(near, joins))
        async with stage.crowd.running_streams():
            await _is_fenced(stage, machines, cut_off, spare)
            machines.restore()
            mended = await stack.enter_async_context(_node(far, joins))
            spare.raylet().kill()
            await until(lambda: len(mended.replicas()) == 1)
            await stage.serves()
        await stage.check()


async def _is_fenced(stage: RayStage, machines: TwoMachines, node: RayNode, spare: RayNode) -> None:
    """Cut off a replica that has streams, and see it die before another is even placed."""
    ((name, replica),) = node.replicas().items()
    before = await stage.is_worth_it(name)
    num_lines = len(stage.server.lines)
    machines.cut()
    await stage.were_moved(before)
    assert lives(replica)  # nothing but the lease can have ended it
    await until(lambda: not lives(replica))
    assert not spare.hosts()
    await stage.server.wait_line(re.compile(f"{name} serves again"), num_lines)
    assert list(spare.replicas()) == [name]
    await stage.serves()
