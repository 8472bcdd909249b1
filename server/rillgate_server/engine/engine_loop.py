"""The engine's thread: commands in, events out, and what happens when a step raises.

Owns the thread, the queue of commands and the answer to faults. Does not know streams, sockets or
asyncio: `on_event` is called on this thread and must not block.

    any thread ── submit, abort, drain, stop ──▶ SimpleQueue ──▶ engine thread: step, step, step
                                                                       │
                                              on_event(EngineEvent), on_fatal

Idle, the thread waits on the queue; while there is work it empties the queue between two steps.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread, current_thread

from rillgate_server.core.block_events import BlockDelta, BlockSnapshot
from rillgate_server.core.clock import Clock
from rillgate_server.core.load import EngineLoad, FlushedBlocks
from rillgate_server.core.request import Rejection, RejectReason, Request, RequestRejected
from rillgate_server.core.step import StepOutput
from rillgate_server.engine.engine import Engine
from rillgate_server.errors import RankLost

MAX_FAILED_STEPS = 3
"""In a row; then the engine gives up: one fault may be a request's, three are the machine's."""

LOAD_INTERVAL_S = 0.05
"""Between two snapshots of the load with work to do: it leaves every 0.2 s, and costs a tenth of
a millisecond with many tenants."""
IDLE_LOG_INTERVAL_S = 10.0
"""Between two lines of the log on how long the device waits for the host."""

_LOG = logging.getLogger(__name__)

EngineEvent = StepOutput | RequestRejected | BlockSnapshot | BlockDelta


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: int
    choice_indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Drain:
    undo: bool


@dataclass(frozen=True, slots=True)
class _Flush:
    flushed: Future[FlushedBlocks]


@dataclass(frozen=True, slots=True)
class _WatchBlocks:
    watch_id: int
    is_on: bool


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Command = Request | _Abort | _Drain | _Flush | _WatchBlocks | _Stop


class EngineLoop:
    """Runs an engine on a thread of its own.

    State, by thread:
        engine      the engine and its scheduler, `_num_failed_steps`, `_load_due_s`, `_watch_ids`,
                    `_idle_log_due_s`
        any, locked `_load` (the latest snapshot), `_progress_s` (of the latest step, or when work
                    came; None without work), `_is_closed` (no command will be read any more),
                    `_is_given_up` (no event will be said any more)
    """

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        on_event: Callable[[EngineEvent], None],
        on_fatal: Callable[[Exception], None] | None = None,
    ) -> None:
        """Take the engine; nothing runs before `start`.

        `on_fatal` is called once when the loop gives up, on the engine thread or by `give_up`.
        Requests that are left then get no event: they are not at fault, and go on elsewhere once
        this process ends.
        """
        self._engine = engine
        self._clock = clock
        self._on_event = on_event
        self._on_fatal = on_fatal
        self._commands: SimpleQueue[_Command] = SimpleQueue()
        self._num_failed_steps = 0
        self._watch_ids: set[int] = set()  # of those who are told what the cache holds
        self._is_stopping = False
        self._idle = Event()
        self._idle.set()
        self._lock = Lock()
        self._is_closed = False
        self._is_given_up = False
        self._progress_s: float | None = None
        self._load = engine.scheduler.load(clock.now())
        self._load_due_s = 0.0
        self._idle_log_due_s = 0.0
        self._thread = Thread(target=self._run, name="rillgate-engine", daemon=True)

    def __repr__(self) -> str:
        return f"EngineLoop(alive={self._thread.is_alive()}, closed={self._is_closed})"

    # -- any thread -------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Hand a request in; its events, or its rejection, come through `on_event`.

        Once the loop has ended the rejection comes at once, on the caller's thread.
        """
        with self._lock:
            if not self._is_closed:
                self._idle.clear()
                if self._progress_s is None:
                    self._progress_s = self._clock.now()
                self._commands.put(request)
                return
        self._on_event(_refused(request))

    def abort(self, request_id: int, choice_indices: tuple[int, ...] = ()) -> None:
        """End some choices of a request, or all; takes effect after the step under way."""
        self._commands.put(_Abort(request_id, choice_indices))

    def flush_cache(self) -> Future[FlushedBlocks]:
        """Forget cached blocks that no request uses; the future tells how many, after the step.

        It is cancelled when the loop has ended.
        """
        flushed: Future[FlushedBlocks] = Future()
        with self._lock:
            if self._is_closed:
                flushed.cancel()
            else:
                self._commands.put(_Flush(flushed))
        return flushed

    def watch_blocks(self, watch_id: int) -> None:
        """Send a BlockSnapshot of this id after the step under way, then every BlockDelta."""
        self._commands.put(_WatchBlocks(watch_id, is_on=True))

    def unwatch_blocks(self, watch_id: int) -> None:
        """Send no more deltas once nobody watches."""
        self._commands.put(_WatchBlocks(watch_id, is_on=False))

    def drain(self, *, undo: bool = False) -> None:
        """Refuse new requests, or take them on again.

        `wait_idle` tells when the accepted ones are done.
        """
        self._commands.put(_Drain(undo))

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request is left and no copy under way; return whether that was in time."""
        return self._idle.wait(timeout_s)

    def stop(self, timeout_s: float) -> bool:
        """End after the step under way and fail what is left; return whether it was in time.

        Steps that have begun behind it are waited for, and what they give is dropped.
        """
        if self._thread.ident is None:
            self._close("the engine was never started")
        if not self._thread.is_alive():
            return True
        self._commands.put(_Stop())
        if current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def give_up(self, error: Exception) -> None:
        """End at once and say nothing: the process is about to end, and its requests go on
        elsewhere (RankLost). The engine thread may be in a step that never returns."""
        with self._lock:
            if self._is_given_up:
                return
            self._is_given_up = self._is_closed = True
        _LOG.error("the engine gives up: %s", error)
        if self._on_fatal is not None:
            self._on_fatal(error)

    def load(self) -> EngineLoad:
        """Return the load after the latest step, and how old that step is now."""
        with self._lock:
            load, progress_s = self._load, self._progress_s
        age_s = 0.0 if progress_s is None else max(0.0, self._clock.now() - progress_s)
        return replace(load, step_age_s=age_s)

    # -- the engine thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._read_commands():
                if self._engine.scheduler.has_work:
                    self._step()
                self._tell_blocks()
                self._publish_load()
            self._engine.drop_begun()
        except RankLost as error:
            self.give_up(error)
        except Exception as error:  # the border of this thread: say so, never die in silence
            _LOG.exception("the engine stops")
            try:
                self._close()
            except Exception:  # it may be `on_event` that raised, and raises again
                _LOG.exception("requests are left without an answer")
            if self._on_fatal is not None:
                self._on_fatal(error)
        else:
            self._close("the engine was stopped")

    def _read_commands(self) -> bool:
        """Apply all commands there are, waiting for one without work; False: it is time to stop."""
        try:
            self._apply(self._wait_for_command())
            while not self._is_stopping:
                self._apply(self._commands.get_nowait())
        except Empty:
            pass
        return not self._is_stopping

    def _wait_for_command(self) -> _Command:
        """Return the next command; raises Empty when there is something else to do first."""
        scheduler = self._engine.scheduler
        if not scheduler.has_work:
            return self._commands.get()
        wait_s = scheduler.seconds_to_wait(self._clock.now())
        return self._commands.get(timeout=wait_s) if wait_s else self._commands.get_nowait()

    def _apply(self, command: _Command) -> None:
        match command:
            case Request():
                rejection = self._engine.scheduler.add(command, self._clock.now())
                if rejection is not None:
                    self._say(RequestRejected(command.request_id, rejection))
            case _Abort():
                self._engine.scheduler.abort(command.request_id, command.choice_indices)
            case _Drain():
                self._engine.scheduler.drain(undo=command.undo)
            case _Flush():
                if command.flushed.set_running_or_notify_cancel():
                    command.flushed.set_result(self._engine.scheduler.flush_cache())
            case _WatchBlocks():
                self._watch_blocks(command)
            case _Stop():
                self._is_stopping = True

    def _watch_blocks(self, command: _WatchBlocks) -> None:
        scheduler, watch_id = self._engine.scheduler, command.watch_id
        if not command.is_on:
            self._watch_ids.discard(watch_id)
            if not self._watch_ids:
                scheduler.watch_blocks(is_on=False)
            return
        self._tell_blocks()  # what has changed until now is in the snapshot
        if not self._watch_ids:
            scheduler.watch_blocks(is_on=True)
        self._watch_ids.add(watch_id)
        self._on_event(BlockSnapshot(watch_id, scheduler.cached_hashes()))

    def _tell_blocks(self) -> None:
        delta = self._engine.scheduler.take_block_changes()
        if delta is not None:
            self._on_event(delta)

    def _step(self) -> None:
        """Run one step; when it raises, its requests fail and the others go on."""
        try:
            output = self._engine.step()
            self._num_failed_steps = 0
        except RankLost:
            raise
        except Exception as error:  # the border of the step
            _LOG.exception("a step failed")
            self._num_failed_steps += 1
            # The caller gets no text of the exception: it may name paths or hold a prompt.
            message = f"the engine step failed ({type(error).__name__})"
            output = self._engine.fail_step(message)
            if self._num_failed_steps >= MAX_FAILED_STEPS:
                self._say(output)
                raise
        if output is not None:
            self._say(output)

    def _say(self, event: EngineEvent) -> None:
        if not self._is_given_up:
            self._on_event(event)

    def _publish_load(self) -> None:
        """Say that the loop lives; with work, what it does is gathered now and then only."""
        now = self._clock.now()
        load = None
        if not self._engine.scheduler.has_work or now >= self._load_due_s:
            load = self._engine.scheduler.load(now)
            # The first step of new work is told at once.
            has_work = self._engine.scheduler.has_work
            self._load_due_s = now + LOAD_INTERVAL_S if has_work else 0.0
            self._log_idle(load, now)
        with self._lock:
            self._load = load or self._load
            if self._engine.scheduler.has_work or not self._commands.empty():
                self._progress_s = now
            else:
                self._progress_s = None
                self._idle.set()

    def _log_idle(self, load: EngineLoad, now: float) -> None:
        """Say now and then how long the device stands idle between steps, where it is measured."""
        if load.device_idle_s_per_step and now >= self._idle_log_due_s:
            self._idle_log_due_s = now + IDLE_LOG_INTERVAL_S
            _LOG.info(
                "the device idles %.3f ms before a step, on average of late; decode step %.3f ms",
                load.device_idle_s_per_step * 1e3,
                load.decode_step_s * 1e3,
            )

    def _close(self, message: str = "") -> None:
        """Refuse whoever was not read yet or comes later; with a message, fail what is here."""
        with self._lock:
            self._is_closed = True
        if message and self._engine.scheduler.has_work:
            self._say(self._engine.scheduler.fail_all(message, self._clock.now()))
        while not self._commands.empty():
            command = self._commands.get_nowait()
            if isinstance(command, Request):
                self._say(_refused(command))
            elif isinstance(command, _Flush):
                command.flushed.cancel()
        self._publish_load()


def _refused(request: Request) -> RequestRejected:
    rejection = Rejection(RejectReason.DRAINING, "the engine has stopped", retry_after_s=1.0)
    return RequestRejected(request.request_id, rejection)
