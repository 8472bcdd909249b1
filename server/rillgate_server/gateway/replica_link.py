"""A gateway's link to one replica: submits requests, and hands each its events.

Owns the connection (it comes back by itself), the one Run stream that carries all requests, and
what the replica last said of itself. One task reads Run and sorts entries into the streams'
buffers; a stream's reader is woken once per message, however many entries were its own.

A replica that says nothing for a second is lost, connected or not: the connection is given up, its
streams break, and should it ever speak again, nobody listens to what it says of them. One whose
engine stands still though it has work keeps its connection, which tells when it goes on, and loses
its streams.

Does not know text, and not what to do when a replica is gone: its streams raise NoReplica.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import grpc

from rillgate_proto.v1 import engine_pb2, engine_pb2_grpc
from rillgate_server.config.groups import LinkConfig
from rillgate_server.core.block_events import BlockEvent
from rillgate_server.core.load import EngineLoad, FlushedBlocks
from rillgate_server.core.pending_output import entries_of
from rillgate_server.core.step import StepOutput
from rillgate_server.core.submission import Submission
from rillgate_server.core.welcome import PROTOCOL_VERSION, Welcome
from rillgate_server.errors import NoReplica
from rillgate_server.gateway.replica_stream import ReplicaStream
from rillgate_server.gateway.replica_watch import ReplicaWatch
from rillgate_server.service.convert_engine import (
    MAX_MESSAGE_BYTES,
    abort_command,
    rejected_from_wire,
    step_output_from_wire,
    submit_command,
)
from rillgate_server.service.convert_replica import flushed_from_wire
from rillgate_server.service.link_door import link_channel, link_metadata

if TYPE_CHECKING:  # only the stubs know the type parameters
    _FlushCall = grpc.aio.UnaryUnaryCall[
        engine_pb2.EngineFlushCacheRequest, engine_pb2.EngineFlushCacheResponse
    ]
    _DrainCall = grpc.aio.UnaryUnaryCall[
        engine_pb2.EngineDrainRequest, engine_pb2.EngineDrainResponse
    ]
    _RunCall = grpc.aio.StreamStreamCall[engine_pb2.EngineCommand, engine_pb2.EngineEvent]

_log = logging.getLogger(__name__)


_Answer = TypeVar("_Answer")
_NO_DOOR = LinkConfig()

FIRST_RETRY_S = 0.05
"""After a broken connection; a Unix socket answers or refuses at once."""
LONGEST_RETRY_S = 0.25
"""Each failed try doubles the wait up to this; a try at a Unix socket costs about a millisecond."""
ANSWER_TIMEOUT_S = 30.0
"""For a flush or a drain, which wait for the step under way; one that takes longer is frozen."""

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A channel lives as long as a connection and is never shared, so that gRPC's own back-off
    # (a second at least) never delays ours.
    ("grpc.use_local_subchannel_pool", 1),
)


class LinkObserver(Protocol):
    """Who hears what becomes of a link; called on the loop, must not block."""

    def on_up(self, link: "ReplicaLink") -> None:
        """Requests can be submitted from now on."""
        ...

    def on_down(self, link: "ReplicaLink") -> None:
        """They cannot any more; its streams break right after this."""
        ...

    def on_load(self, link: "ReplicaLink", load: EngineLoad) -> None:
        """The replica reported its load."""
        ...

    def on_blocks(self, link: "ReplicaLink", event: BlockEvent) -> bool:
        """The replica's cache changed; False: an event is missing, and it shall say all again."""
        ...


class ReplicaLink:
    """The link to the replica at one address.

    State: `_streams` (open ones by key), the current connection's stub and Run's commands (None
    when not connected), `welcome` and `load` as last received, `refusal`.
    """

    def __init__(
        self,
        address: str,
        refuse: Callable[[Welcome], str | None] = lambda welcome: None,
        observer: LinkObserver | None = None,
        door: LinkConfig = _NO_DOOR,
        *,
        wants_blocks: bool = False,
    ) -> None:
        """Link to `address` (`unix:/…` or `host:port`, where `door` says how to be let in).

        `refuse` may say why a replica is not the one wanted. `wants_blocks`: let it announce what
        its cache holds.
        """
        self.address = address
        self.welcome: Welcome | None = None
        self.load: EngineLoad | None = None
        self.why_not = "not connected yet"
        """What keeps it from being connected, for the operator."""
        self.refusal = ""
        """Why the replica at this address is not used, though it answers."""
        self._refuse = refuse
        self._observer = observer
        self._door = door
        self._wants_blocks = wants_blocks
        self._keys = itertools.count(1)
        self._streams: dict[int, ReplicaStream] = {}  # request_key -> open stream
        self._commands: asyncio.Queue[engine_pb2.EngineCommand] | None = None
        self._stub: engine_pb2_grpc.EngineStub | None = None
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"ReplicaLink({self.address!r}, ready={self.is_ready}, streams={len(self._streams)})"

    # -- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to connect, and go on until `close`."""
        assert self._task is None
        self._task = asyncio.create_task(self._keep_connected())

    async def close(self) -> None:
        """Disconnect for good; open streams raise NoReplica."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    @property
    def is_ready(self) -> bool:
        """Whether requests can be submitted now."""
        return self._commands is not None

    @property
    def streams(self) -> tuple[ReplicaStream, ...]:
        """The open ones, oldest first."""
        return tuple(self._streams.values())

    async def wait_ready(self, timeout_s: float | None) -> None:
        """Wait until requests can be submitted; raises NoReplica after `timeout_s`, if given."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            raise NoReplica(f"no replica at {self.address}: {self.why_not}") from None

    # -- requests ---------------------------------------------------------------------------------

    def submit(self, submission: Submission) -> ReplicaStream:
        """Hand a request to the replica; raises NoReplica when there is none now."""
        if self._commands is None:
            raise NoReplica("no replica is connected now")  # callers need no paths of ours
        key = next(self._keys)
        self._commands.put_nowait(submit_command(key, submission))
        stream = self._streams[key] = ReplicaStream(self, key, submission)
        return stream

    async def flush_cache(self) -> FlushedBlocks:
        """Let the replica forget the cached blocks that no request uses; raises NoReplica."""
        stub, metadata = self._connected_stub(), link_metadata(self.address, self._door)
        call: _FlushCall = stub.FlushCache(
            engine_pb2.EngineFlushCacheRequest(), timeout=ANSWER_TIMEOUT_S, metadata=metadata
        )
        return flushed_from_wire(await _answer(call))

    async def drain(self, *, undo: bool) -> None:
        """Let the replica take no more requests on, or take them on again; raises NoReplica."""
        stub, metadata = self._connected_stub(), link_metadata(self.address, self._door)
        call: _DrainCall = stub.Drain(
            engine_pb2.EngineDrainRequest(undo=undo), timeout=ANSWER_TIMEOUT_S, metadata=metadata
        )
        await _answer(call)

    def _connected_stub(self) -> engine_pb2_grpc.EngineStub:
        if self._stub is None:
            raise NoReplica("no replica is connected now")
        return self._stub

    def abort(self, stream: ReplicaStream, choice_indices: tuple[int, ...]) -> None:
        """Tell the replica, unless the stream is over or its connection broken."""
        if stream.is_finished and self._streams.pop(stream.request_key, None) is None:
            return
        if self._commands is not None:
            self._commands.put_nowait(abort_command(stream.request_key, choice_indices))

    def break_streams(self, why: str) -> None:
        """Give all streams up as lost; should the replica go on, it ends their requests."""
        for stream in self.streams:
            self._streams.pop(stream.request_key)
            if self._commands is not None:
                self._commands.put_nowait(abort_command(stream.request_key, ()))
            stream.break_off(why)

    def hand_over(self, why: str) -> int:
        """Give all streams up here so that they go on elsewhere; return how many there were."""
        streams = self.streams
        for stream in streams:
            stream.hand_over(why)
        return len(streams)

    # -- the connection ---------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        """Connect, serve until it breaks, end the streams, connect again."""
        retry_s = FIRST_RETRY_S
        try:
            while True:
                try:
                    await self._serve_connection()
                except grpc.aio.AioRpcError as error:
                    self.why_not = f"{error.code().name}: {error.details()}"
                except NoReplica as error:
                    self.why_not = str(error)
                was_connected = self.is_ready
                if was_connected:
                    _log.warning("lost the replica at %s: %s", self.address, self.why_not)
                self._disconnect()
                retry_s = FIRST_RETRY_S if was_connected else min(2 * retry_s, LONGEST_RETRY_S)
                await asyncio.sleep(retry_s)
        finally:
            self.why_not = "the link is closed"
            self._disconnect()

    def _disconnect(self) -> None:
        was_connected, self._commands = self.is_ready, None
        self._stub = None
        self._ready.clear()
        self.load = None
        if was_connected and self._observer is not None:
            self._observer.on_down(self)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.break_off("the replica was lost before the answer's end")

    async def _serve_connection(self) -> None:
        """Hold one connection until a part of it breaks; raises what broke it."""
        metadata = link_metadata(self.address, self._door)
        async with link_channel(self.address, self._door, _CHANNEL_OPTIONS) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)
            watch = ReplicaWatch(
                stub, metadata, self._note_load, self._note_blocks if self._wants_blocks else None
            )
            try:
                welcome = await watch.open()
                self._check(welcome)
                self.welcome = welcome
                run: _RunCall = stub.Run(metadata=metadata)
                try:
                    await self._serve_run(stub, run, watch.run(welcome.incarnation))
                finally:
                    run.cancel()
            finally:
                watch.close()

    async def _serve_run(
        self,
        stub: engine_pb2_grpc.EngineStub,
        run: "_RunCall",
        watching: Coroutine[None, None, None],
    ) -> None:
        """Carry requests over `run` until it or the watch ends; raises why."""
        commands: asyncio.Queue[engine_pb2.EngineCommand] = asyncio.Queue()
        tasks = (
            asyncio.create_task(watching),
            asyncio.create_task(self._read_run(run)),
            asyncio.create_task(self._write_commands(run, commands)),
        )
        try:
            await run.wait_for_connection()
            assert self.welcome is not None
            self._check(self.welcome)  # another address may have led there meanwhile
            self._commands = commands
            self._stub = stub
            self._ready.set()
            if self._observer is not None:
                self._observer.on_up(self)
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _check(self, welcome: Welcome) -> None:
        """Raise NoReplica if a replica is not one to work with, and say so once."""
        refusal = self._refuse(welcome)
        if welcome.protocol_version != PROTOCOL_VERSION:
            refusal = (
                f"it speaks version {welcome.protocol_version} of the engine's protocol, this "
                f"gateway version {PROTOCOL_VERSION}; run the same release on both sides"
            )
        if refusal is not None and refusal != self.refusal:
            _log.warning("the replica at %s is set aside: %s", self.address, refusal)
        self.refusal = refusal or ""
        if refusal is not None:
            raise NoReplica(refusal)

    def _note_load(self, load: EngineLoad) -> None:
        self.load = load
        if self._observer is not None and self.is_ready:
            self._observer.on_load(self, load)

    def _note_blocks(self, event: BlockEvent) -> bool:
        return self._observer is None or self._observer.on_blocks(self, event)

    async def _read_run(self, run: "_RunCall") -> None:
        async for event in run:
            if event.HasField("step_output"):
                self._deliver(step_output_from_wire(event.step_output))
            elif event.HasField("rejected"):
                rejected = rejected_from_wire(event.rejected)
                if stream := self._streams.pop(rejected.request_id, None):
                    stream.reject(rejected.rejection)
        raise NoReplica("it ended its Run")

    async def _write_commands(
        self,
        run: "_RunCall",
        commands: asyncio.Queue[engine_pb2.EngineCommand],
    ) -> None:
        while True:
            command = await commands.get()
            try:
                await run.write(command)
            except asyncio.InvalidStateError as error:  # over, and its reader not yet told
                raise NoReplica("it ended its Run") from error

    def _deliver(self, output: StepOutput) -> None:
        """Sort a message's entries into the streams' buffers; those of closed keys are dropped."""
        touched: set[ReplicaStream] = set()
        for entry in entries_of(output):
            stream = self._streams.get(entry.request_id)
            if stream is not None:
                stream.add(output.step_id, entry)
                touched.add(stream)
        for stream in touched:
            stream.wake()
            if stream.is_finished:
                self._streams.pop(stream.request_key, None)


async def _answer(call: "grpc.aio.UnaryUnaryCall[Any, _Answer]") -> _Answer:
    """Wait for a replica's answer; raises NoReplica."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = f"the replica gave no answer within {ANSWER_TIMEOUT_S:g} s"
            raise NoReplica(message) from error
        raise NoReplica("the replica was lost before its answer") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Not this task but the call was cancelled: its connection was closed.
        raise NoReplica("the replica was lost before its answer") from error
