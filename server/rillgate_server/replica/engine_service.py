"""The Engine service: gateways' commands to the engine loop, its steps' outputs back to them.

Runs on the I/O thread (an asyncio loop). The engine's thread comes in by `on_event` alone, once per
step, and never waits for a reader. Owns the map from the engine's request ids to the streams that
asked; does no work per token.

Does not know how a step is made, nor what a request means in text.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import grpc

from rillgate_proto.v1 import engine_pb2, engine_pb2_grpc
from rillgate_server.core.block_events import BlockDelta, BlockSnapshot
from rillgate_server.core.clock import Clock
from rillgate_server.core.load import DeviceMemory, EngineLoad, FlushedBlocks
from rillgate_server.core.pending_output import entries_of
from rillgate_server.core.request import Rejection, RejectReason, Request, RequestRejected
from rillgate_server.core.step import StepOutput
from rillgate_server.core.welcome import Welcome
from rillgate_server.engine.engine_loop import EngineEvent
from rillgate_server.replica.cpu_meter import CpuMeter
from rillgate_server.replica.intake import to_request
from rillgate_server.replica.run_stream import MAX_BUFFERED_TOKENS, OpenRequest, RunStream
from rillgate_server.replica.watch_stream import MAX_PENDING_HASHES, WatchStream
from rillgate_server.service.convert_blocks import blocks_event
from rillgate_server.service.convert_engine import (
    rejected_event,
    step_output_event,
    submission_from_wire,
)
from rillgate_server.service.convert_replica import flushed_to_wire, load_event, welcome_event

if TYPE_CHECKING:  # only the stubs know the type parameters
    _RunContext = grpc.aio.ServicerContext[engine_pb2.EngineCommand, engine_pb2.EngineEvent]
    _FlushContext = grpc.aio.ServicerContext[
        engine_pb2.EngineFlushCacheRequest, engine_pb2.EngineFlushCacheResponse
    ]
    _DrainContext = grpc.aio.ServicerContext[
        engine_pb2.EngineDrainRequest, engine_pb2.EngineDrainResponse
    ]
    _WatchContext = grpc.aio.ServicerContext[engine_pb2.WatchRequest, engine_pb2.ReplicaEvent]

_log = logging.getLogger(__name__)

LOAD_INTERVAL_S = 0.2
"""Between two Loads (contracts, section 2)."""


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """How much waits for a slow reader, and how often a Load leaves."""

    max_buffered_tokens: int = MAX_BUFFERED_TOKENS
    """Of a Run stream."""
    max_pending_hashes: int = MAX_PENDING_HASHES
    """Of a Watch."""
    load_interval_s: float = LOAD_INTERVAL_S


_DEFAULT_LIMITS = ServiceLimits()


class EngineHandle(Protocol):
    """What this service needs of the engine loop; every method may be called from any thread."""

    def submit(self, request: Request) -> None:
        """Take a request on, or answer with RequestRejected."""
        ...

    def abort(self, request_id: int, choice_indices: tuple[int, ...] = ()) -> None:
        """End a request, or some of its choices, with the step under way."""
        ...

    def flush_cache(self) -> Future[FlushedBlocks]:
        """Forget the cached blocks that no request uses; cancelled when the engine has ended."""
        ...

    def watch_blocks(self, watch_id: int) -> None:
        """Send a BlockSnapshot of this id, then every BlockDelta, as events."""
        ...

    def unwatch_blocks(self, watch_id: int) -> None:
        """Send no more deltas once nobody watches."""
        ...

    def drain(self, *, undo: bool = False) -> None:
        """Take no more requests on, or take them on again."""
        ...

    def load(self) -> EngineLoad:
        """Return the load after the latest step."""
        ...


class EngineService(engine_pb2_grpc.EngineServicer):
    """The servicer of Engine; made inside the loop that serves it.

    State: `_open` (every open request of every stream), `_streams` and `_watches`.
    """

    def __init__(
        self,
        eos_token_ids: tuple[int, ...],
        welcome: Welcome,
        clock: Clock,
        limits: ServiceLimits = _DEFAULT_LIMITS,
    ) -> None:
        """Serve once `attach` has given an engine; `eos_token_ids` are the model's own."""
        self._eos_token_ids = eos_token_ids
        self._welcome = welcome
        self._clock = clock
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._engine: EngineHandle | None = None
        self._request_ids = itertools.count(1)
        self._open: dict[int, OpenRequest] = {}  # the engine's request id -> open request
        self._streams: set[RunStream] = set()
        self._watch_ids = itertools.count(1)
        self._watches: dict[int, WatchStream] = {}  # watch id -> open Watch
        self._cpu = CpuMeter(clock)
        self._find_device_memory: Callable[[], DeviceMemory] = DeviceMemory
        self._is_draining = False
        self._is_ending = False  # draining for good
        self._all_done = asyncio.Event()
        self._closing = asyncio.Event()

    def __repr__(self) -> str:
        return (
            f"EngineService(open={len(self._open)}, streams={len(self._streams)}, "
            f"draining={self._is_draining})"
        )

    def attach(
        self,
        engine: EngineHandle,
        find_device_memory: Callable[[], DeviceMemory] = DeviceMemory,
    ) -> None:
        """Give the engine whose events go to `on_event`, and who knows of its device's memory;
        once, before serving."""
        assert self._engine is None
        self._engine = engine
        self._find_device_memory = find_device_memory

    @property
    def num_open_requests(self) -> int:
        """Requests taken on and not ended."""
        return len(self._open)

    # -- from the engine's thread -------------------------------------------------------------

    def on_event(self, event: EngineEvent) -> None:
        """Hand an event over to the I/O thread; called on the engine's thread, never blocks."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, event)

    def _deliver(self, event: EngineEvent) -> None:
        match event:
            case RequestRejected():
                self._deliver_rejected(event)
            case StepOutput():
                self._deliver_step(event)
            case BlockSnapshot() if event.watch_id in self._watches:
                self._watches[event.watch_id].add_snapshot(event)
            case BlockDelta():
                for watch in self._watches.values():
                    watch.add_delta(event)
        self._note_if_done()

    def _deliver_rejected(self, event: RequestRejected) -> None:
        request = self._open.pop(event.request_id, None)
        if request is not None:
            request.stream.close_choices(request)
            request.stream.add_rejected(RequestRejected(request.request_key, event.rejection))

    def _deliver_step(self, output: StepOutput) -> None:
        """Sort a step's entries into the streams' books, and wake each stream once."""
        touched: set[RunStream] = set()
        for entry in entries_of(output):
            request = self._open.get(entry.request_id)
            if request is not None:
                request.stream.add(output.step_id, request, entry)
                self._forget_if_closed(request)
                touched.add(request.stream)
        for stream in touched:
            stream.wake()

    def _forget_if_closed(self, request: OpenRequest) -> None:
        if not request.open_choices:
            self._open.pop(request.request_id, None)

    # -- Run ----------------------------------------------------------------------------------

    async def Run(
        self, commands: AsyncIterator[engine_pb2.EngineCommand], context: "_RunContext"
    ) -> None:
        """Serve one gateway's stream until either side ends it."""
        # Now: with a first write that never ends, an abort would send them once more, and fail.
        await context.send_initial_metadata(())
        stream = RunStream(self._limits.max_buffered_tokens)
        self._streams.add(stream)
        tasks = [
            asyncio.create_task(self._read_commands(stream, commands)),
            asyncio.create_task(self._write_events(stream, context)),
            asyncio.create_task(stream.overflowed.wait()),
            asyncio.create_task(self._closing.wait()),
        ]
        reader, _, overflow, _ = tasks
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if done == {reader} and reader.exception() is None:  # half-closed: the rest goes on
                await asyncio.wait(tasks[1:], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            self._end(stream)
            results = await asyncio.gather(*tasks, return_exceptions=True)
        if overflow.done() and not overflow.cancelled():
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"more than {self._limits.max_buffered_tokens} tokens waited for this stream's "
                "reader",
            )
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _read_commands(
        self, stream: RunStream, commands: AsyncIterator[engine_pb2.EngineCommand]
    ) -> None:
        async for command in commands:
            if command.HasField("submit"):
                self._submit(stream, command.submit)
            elif command.HasField("abort"):
                self._abort(stream, command.abort.request_key, command.abort.choice_indices)
        stream.half_close()

    async def _write_events(self, stream: RunStream, context: "_RunContext") -> None:
        while (event := await stream.take()) is not None:
            if isinstance(event, RequestRejected):
                await context.write(rejected_event(event))
            else:
                await context.write(step_output_event(event))
            stream.note_written()
            self._note_if_done()

    def _submit(self, stream: RunStream, submit: engine_pb2.Submit) -> None:
        """Take a request on, or answer why not; nothing a gateway sends raises here."""
        key = submit.request_key
        request: Request | Rejection
        if not stream.used_keys.add(key):
            request = Rejection(
                RejectReason.INVALID, f"request_key is {key}; allowed: a key not used before"
            )
        else:
            request = to_request(
                submission_from_wire(submit),
                next(self._request_ids),
                self._eos_token_ids,
                self._clock.now(),
            )
        if isinstance(request, Rejection):
            stream.add_rejected(RequestRejected(key, request))
            return
        opened = stream.open(key, request.request_id, [it.index for it in request.choices])
        self._open[request.request_id] = opened
        _log.debug("request %s is %d here", submit.request_id, request.request_id)
        self._running_engine.submit(request)

    def _abort(self, stream: RunStream, key: int, choice_indices: Sequence[int] = ()) -> None:
        """End a request or some of its choices; unknown keys are ignored."""
        request = stream.requests.get(key)
        if request is None:
            return
        choices = tuple(it for it in choice_indices if it in request.open_choices)
        if choice_indices and not choices:
            return
        stream.close_choices(request, choices)
        self._forget_if_closed(request)
        self._running_engine.abort(request.request_id, choices if request.open_choices else ())
        self._note_if_done()
        stream.wake()

    def _end(self, stream: RunStream) -> None:
        """Abort what a broken or finished stream leaves behind."""
        for key in list(stream.requests):
            self._abort(stream, key)
        self._streams.discard(stream)
        self._note_if_done()

    @property
    def _running_engine(self) -> EngineHandle:
        assert self._engine is not None, "attach() comes first"
        return self._engine

    # -- the cache ----------------------------------------------------------------------------

    async def FlushCache(
        self, request: engine_pb2.EngineFlushCacheRequest, context: "_FlushContext"
    ) -> engine_pb2.EngineFlushCacheResponse:
        """Forget the cached blocks that no request uses, and say how many they were."""
        flushed = self._running_engine.flush_cache()
        try:
            # Shielded: a caller that goes away must not cancel what the engine's thread completes.
            return flushed_to_wire(await asyncio.shield(asyncio.wrap_future(flushed)))
        except asyncio.CancelledError:
            if not flushed.cancelled():
                raise
        return await context.abort(grpc.StatusCode.UNAVAILABLE, "the engine has stopped")

    # -- Watch and the end --------------------------------------------------------------------

    async def Watch(self, request: engine_pb2.WatchRequest, context: "_WatchContext") -> None:
        """Say what this replica is, then its load, idle or not, and its blocks if asked for."""
        watch = WatchStream(next(self._watch_ids), self._limits.max_pending_hashes)
        self._watches[watch.watch_id] = watch
        try:
            await context.write(welcome_event(self._welcome))
            if request.with_blocks:
                self._running_engine.watch_blocks(watch.watch_id)
            await self._write_watch(watch, context)
        finally:
            del self._watches[watch.watch_id]
            if request.with_blocks:
                self._running_engine.unwatch_blocks(watch.watch_id)
        if watch.is_overflowed:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"more than {self._limits.max_pending_hashes} changed blocks waited for this "
                "stream's reader",
            )

    async def _write_watch(self, watch: WatchStream, context: "_WatchContext") -> None:
        load_due_s = self._clock.now()
        while not (self._closing.is_set() or watch.is_overflowed):
            now = self._clock.now()
            if now >= load_due_s:  # in the middle of a long snapshot too
                load_due_s = now + self._limits.load_interval_s
                await context.write(load_event(self._load()))
                continue
            event = await watch.take(load_due_s - now)
            if event is None:
                load_due_s = self._clock.now()  # it is time, or there is news
            else:
                await context.write(blocks_event(event))

    def _load(self) -> EngineLoad:
        """Return the engine's load, and what this side knows of it sooner or alone."""
        return replace(
            self._running_engine.load(),
            is_draining=self._is_draining,  # the engine hears of it after the step under way
            free_cpu_fraction=self._cpu.free_fraction(),
            device_memory=self._find_device_memory(),
        )

    async def Drain(
        self, request: engine_pb2.EngineDrainRequest, context: "_DrainContext"
    ) -> engine_pb2.EngineDrainResponse:
        """Take no more requests on, or take them on again; answer at once, with what runs."""
        if request.undo and self._is_ending:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the replica ends, with {len(self._open)} open requests; that cannot be undone",
            )
        self._set_draining(not request.undo)
        return engine_pb2.EngineDrainResponse(num_open_requests=len(self._open))

    def drain(self) -> None:
        """Refuse new requests for good; those that run go on, or their gateways move them."""
        self._is_ending = True
        self._set_draining(True)
        self._note_if_done()

    def _set_draining(self, is_draining: bool) -> None:
        self._is_draining = is_draining
        self._running_engine.drain(undo=not is_draining)
        for watch in self._watches.values():
            watch.wake()  # gateways hear of it at once

    async def wait_done(self) -> None:
        """Wait until a service that drains for good has no open request and nothing to write."""
        assert self._is_ending
        await self._all_done.wait()

    def close(self) -> None:
        """End every stream, and with it its requests; gateways see the replica go."""
        self._closing.set()
        for watch in self._watches.values():
            watch.wake()

    def _note_if_done(self) -> None:
        if self._is_ending and not self._open and all(it.is_flushed for it in self._streams):
            self._all_done.set()
