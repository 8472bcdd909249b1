"""Two replicas on a Ray cluster under streams that are watched.

Owns the streams and what the gateway says of the replicas. Does not know what is broken.
"""

import asyncio
from collections.abc import Callable

from rillgate import AsyncClient
from rillgate.status_types import ReplicaState, ServerStatus
from tests.support.crowd import Crowd, undisturbed
from tests.support.served import START_S, Server

FLAGS = (
    *("--cluster", "ray", "--replicas", "2", "--dtype", "float32"),
    *("--set", "replica.min_step_ms=20", "--set", "gateway.failover_wait_s=90"),
)
MIN_HIT = 4
"""Streams with a token that a break must hit to count."""
_POLL_S = 0.05


class RayStage:
    """A served cluster, a client of it, and the crowd that calls by it."""

    def __init__(self, server: Server, client: AsyncClient) -> None:
        """Use `open`."""
        self.server = server
        self.client = client
        self.crowd = Crowd([client], [])

    @classmethod
    async def open(cls, server: Server, client: AsyncClient) -> "RayStage":
        """Wait for both replicas, and hear what they answer in peace."""
        stage = cls(server, client)
        await stage.serves()
        stage.crowd = Crowd([client], await undisturbed(client))
        return stage

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
        await self.status(
            lambda it: sum(one.state is ReplicaState.READY for one in it.replicas) == 2
        )

    async def is_worth_it(self, name: str) -> int:
        """Wait until a replica has enough streams; return how many were moved so far."""

        def has_enough(status: ServerStatus) -> bool:
            streams = {it.replica_id: it.num_streams for it in status.replicas}
            return streams.get(name, 0) - self.crowd.num_without_token > MIN_HIT

        return (await self.status(has_enough)).num_moved_streams

    async def were_moved(self, before: int) -> None:
        """Wait until enough streams have left it."""
        await self.status(lambda it: it.num_moved_streams - before >= MIN_HIT)

    async def check(self) -> None:
        """All streams heard what they should have, and nothing is left of them."""
        assert self.crowd.differences() == []
        await self.status(lambda it: it.num_blocks_used == 0)
