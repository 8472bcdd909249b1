"""`rillgate serve`: starts a replica and a gateway, keeps them alive, stops them in order.

Owns the children, the directory of the socket between them, and what the operator reads. Needs
neither torch nor gRPC, so that it survives whatever they do. Children are started by exec (never by
fork alone: after gRPC or torch have threads that is not safe) and die with it, on a leash.

    start    replica and gateway side by side (callers get UNAVAILABLE until the replica is there)
    crash    the same child again, with back-off; the other one goes on
    SIGTERM  gateway (it drains), then replica; a second signal kills both
"""

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rillgate_server.config.groups import MAX_SOCKET_PATH_BYTES
from rillgate_server.config.settings import Settings
from rillgate_server.errors import ConfigError
from rillgate_server.replica.child import Child, ChildSpec, describe_exit
from rillgate_server.replica.progress import shown_progress
from rillgate_server.replica.restarts import RestartPolicy

EXIT_OPERATOR = 2
"""What a child exits with when starting it again is no help (a setting, a checkpoint, memory); it
has said why in one line."""
EXIT_CRASHED = 1
EXIT_KILLED = 130

_STOP_MARGIN_S = 10.0  # a child's own end after its grace: closing sockets, freeing memory


class GaveUp(Exception):
    """Serving is over; the exit code says whose fault it was."""

    def __init__(self, exit_code: int, message: str = "") -> None:
        """Take what to say (empty: the child has said it) and the exit code."""
        self.exit_code = exit_code
        super().__init__(message)


class Supervisor:
    """Keeps children alive until it is told to stop.

    State: `_living` (name -> child), the first READY of each child, whether it is stopping.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        policy: RestartPolicy,
        on_ready: Callable[[dict[str, str]], None],
        say: Callable[[str], None],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Supervise `specs`, stopped from last to first.

        `on_ready` gets name -> READY's text, `on_progress` the bytes that a child has loaded.
        """
        self._specs = specs
        self._policy = policy
        self._on_ready = on_ready
        self._say = say
        self._on_progress = on_progress
        self._living: dict[str, Child] = {}  # name -> child
        self._ready_texts: dict[str, str] = {}  # name -> text of its first READY
        self._pinned: dict[str, dict[str, str]] = {}  # name -> environment of its next lives
        self._stop = asyncio.Event()
        self._num_signals = 0

    def __repr__(self) -> str:
        return f"Supervisor({list(self._living.values())}, stopping={self._stop.is_set()})"

    def pin(self, name: str, environment: dict[str, str]) -> None:
        """Give a child `environment`, too, whenever it is started again."""
        self._pinned[name] = environment

    def request_stop(self) -> None:
        """Begin to stop; asked a second time, kill."""
        self._num_signals += 1
        self._stop.set()
        if self._num_signals > 1:
            for child in self._living.values():
                child.kill()

    async def run(self) -> int:
        """Serve until stopped; return the exit code. No child outlives this call."""
        keepers = [asyncio.create_task(self._keep(spec)) for spec in self._specs]
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((*keepers, stopped), return_when=asyncio.FIRST_COMPLETED)
            gave_up = next((task.exception() for task in keepers if task.done()), None)
            await self._stop_children()
            if self._num_signals > 1:
                return EXIT_KILLED
            if isinstance(gave_up, GaveUp):
                if str(gave_up):
                    self._say(str(gave_up))
                return gave_up.exit_code
            if gave_up is not None:
                raise gave_up
            return 0
        finally:
            self._stop.set()
            for child in self._living.values():
                child.kill()
            await asyncio.gather(*keepers, stopped, return_exceptions=True)

    async def _keep(self, spec: ChildSpec) -> None:
        """Start a child, again and again; returns when stopping, raises GaveUp."""
        quick_crashes = 0
        while not self._stop.is_set():
            pinned = {**spec.environment, **self._pinned.get(spec.name, {})}
            child = await Child.start(replace(spec, environment=pinned), self._on_progress)
            self._living[spec.name] = child
            if self._stop.is_set():  # told so while the process was being made
                child.kill()
            child.ready.add_done_callback(lambda ready: self._note_ready(spec.name, ready))
            code = await child.wait()
            del self._living[spec.name]
            if self._stop.is_set():
                return
            if code == EXIT_OPERATOR:
                raise GaveUp(EXIT_OPERATOR)
            served_s = 0.0 if child.ready_at_s is None else time.monotonic() - child.ready_at_s
            quick_crashes = self._policy.count(quick_crashes, served_s)
            delay_s = self._policy.delay_s(quick_crashes)
            if delay_s is None:
                raise GaveUp(EXIT_CRASHED, _epitaph(child, code, quick_crashes))
            self._say(
                f"the {spec.name} died ({describe_exit(code)}); starting it again in {delay_s:g} s"
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), delay_s)

    def _note_ready(self, name: str, ready: "asyncio.Future[str]") -> None:
        if ready.cancelled():
            return
        if name in self._ready_texts:
            self._say(f"the {name} serves again: {ready.result()}")
            return
        self._ready_texts[name] = ready.result()
        if len(self._ready_texts) == len(self._specs):
            self._on_ready(dict(self._ready_texts))

    async def _stop_children(self) -> None:
        """Stop the children one after another, the last one first."""
        self._stop.set()
        for spec in reversed(self._specs):
            child = self._living.get(spec.name)
            if child is not None and not await child.stop() and self._num_signals < 2:
                self._say(f"the {spec.name} did not stop within {spec.stop_grace_s:g} s; killed")


def _epitaph(child: Child, code: int, quick_crashes: int) -> str:
    lines = [
        f"the {child.spec.name} died {quick_crashes} times in a row soon after its start, "
        f"the last time with {describe_exit(code)}; giving up. Its last lines:",
        *(f"    {line}" for line in child.last_lines),
    ]
    return "\n".join(lines)


def run_supervisor(settings: Settings, model_dir: Path) -> int:
    """Serve the checkpoint of `model_dir` until SIGTERM, SIGINT or SIGHUP; return the exit code."""
    with _socket_path(settings.replica.socket) as socket:
        resolved = settings.model_copy(
            update={
                "model": replace(settings.model, path=str(model_dir.resolve())),
                "replica": replace(settings.replica, socket=str(socket)),
                # Made here, so that a gateway that is started again keeps it.
                "gateway": replace(
                    settings.gateway,
                    cluster_secret=settings.gateway.cluster_secret or secrets.token_hex(),
                ),
            }
        )
        return asyncio.run(_supervise(resolved))


async def _supervise(settings: Settings) -> int:
    started_s = time.monotonic()

    def on_ready(texts: dict[str, str]) -> None:
        _say(
            f"serving {texts['replica']} on {texts['gateway']} "
            f"(ready after {time.monotonic() - started_s:.1f} s; Ctrl-C stops)"
        )
        # A gateway that took a free port comes back on the same one.
        supervisor.pin("gateway", {"RILLGATE_GATEWAY__LISTEN": texts["gateway"]})

    with shown_progress(sys.stderr) as show:
        supervisor = Supervisor(_children(settings), RestartPolicy(), on_ready, _say, show)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # HUP: its terminal closed
            loop.add_signal_handler(number, supervisor.request_stop)
        return await supervisor.run()


def _children(settings: Settings) -> tuple[ChildSpec, ...]:
    """Describe the children, in the order of their start."""
    command = (sys.executable, "-m", "rillgate_server.cli")
    environment = {
        # gRPC's C core writes lines of its own beside the errors that it also raises.
        "GRPC_VERBOSITY": os.environ.get("GRPC_VERBOSITY", "NONE"),
        **settings.to_environment(),
    }
    return (
        ChildSpec(
            "replica",
            (*command, "replica"),
            {**environment, "RILLGATE_GATEWAY__CLUSTER_SECRET": ""},  # gets salts, never the secret
            settings.replica.drain_grace_s + _STOP_MARGIN_S,
        ),
        ChildSpec(
            "gateway",
            (*command, "gateway"),
            environment,
            settings.gateway.drain_grace_s + _STOP_MARGIN_S,
        ),
    )


@contextlib.contextmanager
def _socket_path(configured: str) -> Iterator[Path]:
    """Yield where the replica listens: as configured, or in a directory for this user alone."""
    if configured:
        yield Path(configured)
        return
    try:
        made = tempfile.TemporaryDirectory(prefix="rillgate-")  # mode 0700
    except OSError as error:
        raise ConfigError(
            f"no directory for the replica's socket can be made: {error.strerror}; allowed: "
            f"replica.socket, a path that can be written, or TMPDIR, such a directory"
        ) from error
    with made as directory:
        path = Path(directory) / "replica.sock"
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(
                f"TMPDIR makes a socket's path of {len(os.fsencode(path))} bytes; allowed: "
                f"{MAX_SOCKET_PATH_BYTES} (set replica.socket)"
            )
        yield path


def _say(message: str) -> None:
    print(f"rillgate: {message}", file=sys.stderr, flush=True)
