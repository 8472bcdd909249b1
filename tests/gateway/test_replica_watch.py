"""The watch over one replica, with a call whose answers a test gives."""

import asyncio

import pytest

from rillgate_proto.v1 import engine_pb2
from rillgate_server.errors import NoReplica
from rillgate_server.gateway.replica_watch import ReplicaWatch


class HeldCall:
    """A Watch whose first word comes when a test says so. Its own stub, too."""

    def __init__(self) -> None:
        self.first: asyncio.Future[engine_pb2.ReplicaEvent] = asyncio.Future()

    def Watch(self, request: engine_pb2.WatchRequest, metadata: object) -> "HeldCall":
        """Begin."""
        return self

    def __aiter__(self) -> "HeldCall":
        return self

    async def __anext__(self) -> engine_pb2.ReplicaEvent:
        return await self.first


@pytest.mark.parametrize("num_turns", range(5))
async def test_a_cancellation_at_the_moment_of_the_first_word_is_not_lost(num_turns: int) -> None:
    """However many turns of the loop it comes after the word: a link that closes just as its
    replica breaks would otherwise connect again for ever, and its owner wait as long."""
    call = HeldCall()
    watch = ReplicaWatch(call, (), lambda load: None, None)  # type: ignore[arg-type]
    opening = asyncio.create_task(watch.open())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    call.first.set_exception(NoReplica("it broke"))
    for _ in range(num_turns):
        await asyncio.sleep(0)
    was_open = opening.cancel()
    await asyncio.wait([opening])
    assert opening.cancelled() == was_open
