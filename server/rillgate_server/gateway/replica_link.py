"""A gateway's link to one replica: submits requests, and hands each its events.

Owns the connection (it comes back by itself), the one Run stream that carries all requests, and
what the replica last said of itself. One task reads Run and sorts entries into the streams'
buffers; a stream's reader is woken once per message, however many entries were its own.

Does not know text, and not what to do when a replica is gone: its streams raise NoReplica.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import grpc

from rillgate_proto.v1 import engine_pb2, engine_pb2_grpc
from rillgate_server.core.load import EngineLoad, FlushedBlocks
from rillgate_server.core.pending_output import PendingOutput, StepEntry, entries_of
from rillgate_server.core.request import RequestRejected
from rillgate_server.core.step import (
    ChoiceFinished,
    ChoiceTokens,
    RequestFailed,
    StepOutput,
)
from rillgate_server.core.submission import Submission
from rillgate_server.core.welcome import PROTOCOL_VERSION, Welcome
from rillgate_server.errors import NoReplica
from rillgate_server.service.convert_engine import (
    MAX_MESSAGE_BYTES,
    abort_command,
    rejected_from_wire,
    step_output_from_wire,
    submit_command,
)
from rillgate_server.service.convert_replica import (
    flushed_from_wire,
    load_from_wire,
    welcome_from_wire,
)

if TYPE_CHECKING:  # only the stubs know the type parameters
    _WatchCall = grpc.aio.UnaryStreamCall[engine_pb2.WatchRequest, engine_pb2.ReplicaEvent]
    _FlushCall = grpc.aio.UnaryUnaryCall[
        engine_pb2.EngineFlushCacheRequest, engine_pb2.EngineFlushCacheResponse
    ]
    _RunCall = grpc.aio.StreamStreamCall[engine_pb2.EngineCommand, engine_pb2.EngineEvent]

_log = logging.getLogger(__name__)

Event = StepEntry | RequestRejected

FIRST_RETRY_S = 0.05
"""After a broken connection; a Unix socket answers or refuses at once."""
LONGEST_RETRY_S = 0.25
"""Each failed try doubles the wait up to this; a try at a Unix socket costs about a millisecond."""
FLUSH_TIMEOUT_S = 30.0
"""For a flush, which waits for the step under way; a replica that takes longer is frozen."""
LOST_AFTER_S = 1.0
"""Without a Load for this long a replica is lost (contracts, section 2)."""

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A channel lives as long as a connection and is never shared, so that gRPC's own back-off
    # (a second at least) never delays ours.
    ("grpc.use_local_subchannel_pool", 1),
)


class ReplicaStream:
    """One request's events. One task reads; `abort` and `close` may come from any task."""

    def __init__(self, link: "ReplicaLink", request_key: int, submission: Submission) -> None:
        """Made by `ReplicaLink.submit`."""
        self.request_key = request_key
        self._link = link
        self._open_choices = {choice.index for choice in submission.choices}
        self._pending = PendingOutput()
        self._rejected: RequestRejected | None = None
        self._broken: str | None = None
        self._wake = asyncio.Event()

    def __repr__(self) -> str:
        return (
            f"ReplicaStream(request_key={self.request_key}, open={sorted(self._open_choices)}, "
            f"pending={self._pending!r}, broken={self._broken!r})"
        )

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will arrive (something may still wait to be read)."""
        return not self._open_choices

    async def next_events(self) -> list[Event]:
        """Wait for events and return all since the last call, each choice's tokens in one.

        Empty: the request is over, and everything was returned. Raises NoReplica when the replica
        was lost before the request's end, after the events that had arrived.
        """
        while not (self._pending or self._rejected):
            if self.is_finished:
                return []
            if self._broken is not None:
                raise NoReplica(self._broken)
            self._wake.clear()
            await self._wake.wait()
        if self._rejected is not None:
            rejected, self._rejected = self._rejected, None
            return [rejected]
        return list(entries_of(self._pending.take()))

    def abort(self, choice_indices: tuple[int, ...] = ()) -> None:
        """End the request, or some of its choices; never fails. Nothing more arrives for them."""
        ended = tuple(it for it in choice_indices if it in self._open_choices)
        if not self._open_choices or (choice_indices and not ended):
            return
        self._open_choices.difference_update(ended or tuple(self._open_choices))
        self._link._abort(self, ended if self._open_choices else ())
        self._wake.set()

    def close(self) -> None:
        """Abort the request unless it is over. Idempotent."""
        self.abort()

    # -- by the link's reader ---------------------------------------------------------------------

    def _add(self, step_id: int, entry: StepEntry) -> None:
        if isinstance(entry, ChoiceTokens | ChoiceFinished):
            if entry.choice_index not in self._open_choices:
                return  # aborted
            if isinstance(entry, ChoiceFinished):
                self._open_choices.discard(entry.choice_index)
        elif isinstance(entry, RequestFailed):
            self._open_choices.clear()
        self._pending.add(step_id, entry)

    def _reject(self, rejected: RequestRejected) -> None:
        self._rejected = rejected
        self._open_choices.clear()
        self._wake.set()

    def _break(self, message: str) -> None:
        self._broken = message
        self._wake.set()


class ReplicaLink:
    """The link to the replica at one address.

    State: `_streams` (open ones by key), the current connection's stub and Run's commands (None
    when not connected), `welcome` and `load` as last received.
    """

    def __init__(
        self, address: str, refuse: Callable[[Welcome], str | None] = lambda welcome: None
    ) -> None:
        """Link to `address` (`unix:/…`); `refuse` may say why a replica is not the one wanted."""
        self.address = address
        self.welcome: Welcome | None = None
        self.load: EngineLoad | None = None
        self._refuse = refuse
        self._load_at_s = 0.0
        self._keys = itertools.count(1)
        self._streams: dict[int, ReplicaStream] = {}  # request_key -> open stream
        self._commands: asyncio.Queue[engine_pb2.EngineCommand] | None = None
        self._stub: engine_pb2_grpc.EngineStub | None = None
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._why_not = "not connected yet"

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
    def is_lost(self) -> bool:
        """Whether the replica has said nothing for too long, connected or not."""
        now_s = asyncio.get_running_loop().time()
        return not self.is_ready or now_s - self._load_at_s > LOST_AFTER_S

    async def wait_ready(self, timeout_s: float | None) -> None:
        """Wait until requests can be submitted; raises NoReplica after `timeout_s`, if given."""
        try:
            await asyncio.wait_for(self._ready.wait(), timeout_s)
        except TimeoutError:
            raise NoReplica(f"no replica at {self.address}: {self._why_not}") from None

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
        if self._stub is None:
            raise NoReplica("no replica is connected now")
        call: _FlushCall = self._stub.FlushCache(
            engine_pb2.EngineFlushCacheRequest(), timeout=FLUSH_TIMEOUT_S
        )
        try:
            return flushed_from_wire(await call)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                message = f"the replica gave no answer within {FLUSH_TIMEOUT_S:g} s"
                raise NoReplica(message) from error
            raise NoReplica("the replica was lost before its answer") from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not this task but the call was cancelled: its connection was closed.
            raise NoReplica("the replica was lost before its answer") from error

    def _abort(self, stream: ReplicaStream, choice_indices: tuple[int, ...]) -> None:
        """Tell the replica, unless the stream is over or its connection broken."""
        if stream.is_finished and self._streams.pop(stream.request_key, None) is None:
            return
        if self._commands is not None:
            self._commands.put_nowait(abort_command(stream.request_key, choice_indices))

    # -- the connection ---------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        """Connect, serve until it breaks, end the streams, connect again."""
        retry_s = FIRST_RETRY_S
        try:
            while True:
                try:
                    await self._serve_connection()
                except grpc.aio.AioRpcError as error:
                    self._why_not = f"{error.code().name}: {error.details()}"
                except NoReplica as error:
                    self._why_not = str(error)
                was_connected = self.is_ready
                if was_connected:
                    _log.warning("lost the replica at %s: %s", self.address, self._why_not)
                self._disconnect()
                retry_s = FIRST_RETRY_S if was_connected else min(2 * retry_s, LONGEST_RETRY_S)
                await asyncio.sleep(retry_s)
        finally:
            self._why_not = "the link is closed"
            self._disconnect()

    def _disconnect(self) -> None:
        self._commands = None
        self._stub = None
        self._ready.clear()
        self.load = None
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream._break("the replica was lost before the answer's end")

    async def _serve_connection(self) -> None:
        """Hold one connection until a part of it breaks; raises what broke it."""
        async with grpc.aio.insecure_channel(self.address, options=_CHANNEL_OPTIONS) as channel:
            stub = engine_pb2_grpc.EngineStub(channel)
            watch: _WatchCall = stub.Watch(engine_pb2.WatchRequest())
            replica_events = aiter(watch)
            self._greet(await anext(replica_events, None))
            run: _RunCall = stub.Run()
            commands: asyncio.Queue[engine_pb2.EngineCommand] = asyncio.Queue()
            tasks = (
                asyncio.create_task(self._read_watch(replica_events)),
                asyncio.create_task(self._read_run(run)),
                asyncio.create_task(self._write_commands(run, commands)),
            )
            try:
                await run.wait_for_connection()
                self._commands = commands
                self._stub = stub
                self._ready.set()
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                run.cancel()
                watch.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _greet(self, event: engine_pb2.ReplicaEvent | None) -> None:
        """Take a replica's Welcome, or raise NoReplica if it is not one to work with."""
        if event is None or not event.HasField("welcome"):
            raise NoReplica("it did not say what it is")
        welcome = welcome_from_wire(event.welcome)
        if welcome.protocol_version != PROTOCOL_VERSION:
            raise NoReplica(
                f"it speaks version {welcome.protocol_version} of the engine's protocol, "
                f"this gateway version {PROTOCOL_VERSION}"
            )
        if refusal := self._refuse(welcome):
            raise NoReplica(refusal)
        self.welcome = welcome

    async def _read_watch(self, events: AsyncIterator[engine_pb2.ReplicaEvent]) -> None:
        async for event in events:
            if event.HasField("load"):
                self.load = load_from_wire(event.load)
                self._load_at_s = asyncio.get_running_loop().time()
        raise NoReplica("it ended its Watch")

    async def _read_run(self, run: "_RunCall") -> None:
        async for event in run:
            if event.HasField("step_output"):
                self._deliver(step_output_from_wire(event.step_output))
            elif event.HasField("rejected"):
                rejected = rejected_from_wire(event.rejected)
                if stream := self._streams.pop(rejected.request_id, None):
                    stream._reject(rejected)
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
                stream._add(output.step_id, entry)
                touched.add(stream)
        for stream in touched:
            stream._wake.set()
            if stream.is_finished:
                self._streams.pop(stream.request_key, None)
