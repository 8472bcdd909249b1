"""What a replica says of itself, over one connection: its Welcome, its load, its cache's blocks.

Owns one Watch at a time, opens it again where an event of the cache is missing, and notices when
the replica falls silent. Does not know requests, nor what follows from what it hears.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import grpc

from rillgate_proto.v1 import engine_pb2, engine_pb2_grpc
from rillgate_server.core.block_events import BlockEvent
from rillgate_server.core.load import EngineLoad
from rillgate_server.core.welcome import Welcome
from rillgate_server.errors import NoReplica
from rillgate_server.service.convert_blocks import blocks_from_wire
from rillgate_server.service.convert_replica import load_from_wire, welcome_from_wire

if TYPE_CHECKING:  # only the stubs know the type parameters
    _WatchCall = grpc.aio.UnaryStreamCall[engine_pb2.WatchRequest, engine_pb2.ReplicaEvent]

WELCOME_TIMEOUT_S = 5.0
"""For a replica's first word: a stopped process still takes connections."""
LOST_AFTER_S = 1.0
"""Without a Load for this long a replica is lost (contracts, section 2)."""
_LOOK_S = 0.1  # between two looks at the silence
_NUM_SILENT_LOOKS = round(LOST_AFTER_S / _LOOK_S)

Metadata = tuple[tuple[str, str], ...]


class ReplicaWatch:
    """Watches over one connection.

    State: the call under way, the looks since the latest Load.
    """

    def __init__(
        self,
        stub: engine_pb2_grpc.EngineStub,
        metadata: Metadata,
        on_load: Callable[[EngineLoad], None],
        on_blocks: Callable[[BlockEvent], bool] | None,
    ) -> None:
        """Watch by `stub`. `on_blocks` (None: blocks are not asked for) says whether the event
        follows the one before it."""
        self._stub = stub
        self._metadata = metadata
        self._on_load = on_load
        self._on_blocks = on_blocks
        self._call: _WatchCall | None = None
        self._num_silent_looks = 0

    def __repr__(self) -> str:
        return f"ReplicaWatch(open={self._call is not None}, silent={self._num_silent_looks})"

    async def open(self) -> Welcome:
        """Begin to watch; return the first word. Raises NoReplica or grpc's error."""
        request = engine_pb2.WatchRequest(with_blocks=self._on_blocks is not None)
        self._call = self._stub.Watch(request, metadata=self._metadata)
        self._events: AsyncIterator[engine_pb2.ReplicaEvent] = aiter(self._call)
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                event = await anext(self._events, None)
        except TimeoutError:
            raise NoReplica(f"it said nothing within {WELCOME_TIMEOUT_S:g} s") from None
        if event is None or not event.HasField("welcome"):
            raise NoReplica("it did not say what it is")
        self._num_silent_looks = 0
        return welcome_from_wire(event.welcome)

    async def run(self, incarnation: int) -> None:
        """Hand on what comes until the replica is lost; raises NoReplica or grpc's error."""
        silence = asyncio.create_task(self._notice_silence())
        reading = asyncio.create_task(self._read(incarnation))
        try:
            done, _ = await asyncio.wait((silence, reading), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            silence.cancel()
            reading.cancel()
            await asyncio.gather(silence, reading, return_exceptions=True)

    def close(self) -> None:
        """End the call. Idempotent."""
        if self._call is not None:
            self._call.cancel()
            self._call = None

    async def _read(self, incarnation: int) -> None:
        while True:
            try:
                is_complete = await self._read_call()
            except grpc.aio.AioRpcError as error:
                # We read too slowly for its cache's events: it lives, and says all again.
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                is_complete = False
            if is_complete:
                raise NoReplica("it ended its Watch")
            self.close()
            if (await self.open()).incarnation != incarnation:
                raise NoReplica("another process answers there now")

    async def _read_call(self) -> bool:
        """Read to the end of the call (True) or to a missing event (False)."""
        async for event in self._events:
            if event.HasField("load"):
                self._num_silent_looks = 0
                self._on_load(load_from_wire(event.load))
            elif event.HasField("blocks") and self._on_blocks is not None:
                is_complete = self._on_blocks(blocks_from_wire(event.blocks))
                if not is_complete:
                    return False
        return True

    async def _notice_silence(self) -> None:
        """Raise NoReplica when the replica has said nothing for too long.

        Counts looks, not time: where this process itself stood still for a second, what the
        replica said meanwhile is read before the next look.
        """
        while self._num_silent_looks < _NUM_SILENT_LOOKS:
            await asyncio.sleep(_LOOK_S)
            self._num_silent_looks += 1
        raise NoReplica(f"it has said nothing for {LOST_AFTER_S:g} s")
