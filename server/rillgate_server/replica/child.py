"""One child process of the supervisor: started by exec, listened to, stopped.

Owns the process, the words it says on stdout and its last lines of stderr. Does not know what the
child does, nor when to start it again (the supervisor does).

    PROGRESS DONE TOTAL     bytes, while it loads
    LISTENING HOST:PORT     before READY, where it has a TCP door
    READY TEXT              once it serves; the text is for people
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

EXIT_CRASHED = 1
EXIT_OPERATOR = 2
"""What a child exits with when starting it again is no help (a setting, a checkpoint, memory); it
has said why in one line."""
EXIT_FROZEN = 3
"""What a replica's watchdog exits with when the engine makes no progress."""

READY = "READY"
LISTENING = "LISTENING"
PROGRESS = "PROGRESS"
SUPERVISED = "RILLGATE_SUPERVISED"
"""In a child's environment: somebody reads PROGRESS lines and shows them, and passes stderr on to a
`terminal` or a `log`."""

LEASH = Path(__file__).with_name("leash.py")
"""`LEASH PARENT_PID COMMAND …`: the command dies with that parent."""
_NUM_LAST_LINES = 20
_MAX_LINE_BYTES = 1 << 16
_PIPE_GRACE_S = 1.0  # for a dead child's last words, when something it started holds the pipe


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to start."""

    name: str
    """For messages."""
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Beside the supervisor's own; may hold secrets."""
    stop_grace_s: float = 30.0
    """From SIGTERM to SIGKILL."""


class Child:
    """A started child.

    State: the process, `ready` (the text after READY, and when it came), `listens_at` (the address
    after LISTENING), the last lines of stderr.
    """

    def __init__(
        self,
        spec: ChildSpec,
        process: asyncio.subprocess.Process,
        on_progress: Callable[[int, int], None],
    ) -> None:
        """Use `start`."""
        self.spec = spec
        self.ready_at_s: float | None = None
        self._on_progress = on_progress
        self.ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.listens_at = ""
        self.last_lines: deque[str] = deque(maxlen=_NUM_LAST_LINES)
        self._process = process
        self._readers = [
            asyncio.create_task(self._read_stdout()),
            asyncio.create_task(self._read_stderr()),
        ]

    def __repr__(self) -> str:
        return f"Child({self.spec.name}, pid={self.pid}, exit_code={self._process.returncode})"

    @classmethod
    async def start(
        cls, spec: ChildSpec, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> "Child":
        """Start the process: on a leash, and out of the terminal's Ctrl-C (we pass it on)."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), *spec.command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **spec.environment, SUPERVISED: _destination()},
            process_group=0,
        )
        return cls(spec, process, on_progress)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    async def wait(self) -> int:
        """Wait for its end and its last words; return the exit code, minus the signal's number."""
        try:
            code = await self._process.wait()
            await asyncio.wait(self._readers, timeout=_PIPE_GRACE_S)
        finally:
            for reader in self._readers:
                reader.cancel()
            self.ready.cancel()
        return code

    async def stop(self) -> bool:
        """Ask it to end and wait; False when it had to be killed."""
        self._send(signal.SIGTERM)
        try:
            async with asyncio.timeout(self.spec.stop_grace_s):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
            return False
        return True

    def kill(self) -> None:
        """End it at once."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def _read_stdout(self) -> None:
        assert self._process.stdout is not None
        async for line in _lines(self._process.stdout):
            word, _, rest = line.partition(" ")
            if word == READY and not self.ready.done():
                self.ready_at_s = time.monotonic()
                self.ready.set_result(rest)
            elif word == LISTENING:
                self.listens_at = rest
            elif word == PROGRESS:
                done, _, total = rest.partition(" ")
                self._on_progress(int(done), int(total))
            else:
                _pass_on(line, sys.stdout)

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        async for line in _lines(self._process.stderr):
            self.last_lines.append(line)
            _pass_on(line, sys.stderr)


def _destination() -> str:
    """Say where a child's lines end up, which it cannot see."""
    return "terminal" if sys.stderr.isatty() else "log"


def describe_exit(code: int) -> str:
    """Say in words how a process ended."""
    if code == EXIT_FROZEN:
        return f"exit code {code}: it made no progress, and its watchdog ended it"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _pass_on(line: str, to: TextIO) -> None:
    """Repeat a child's line; nobody reading us any more is no reason to stop serving."""
    with contextlib.suppress(OSError):
        print(line, file=to, flush=True)


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """Iterate over lines; one that is too long comes in parts (StreamReader's would raise)."""
    rest = b""
    while chunk := await reader.read(_MAX_LINE_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
        if len(rest) > _MAX_LINE_BYTES:
            yield rest.decode(errors="replace")
            rest = b""
    if rest:
        yield rest.decode(errors="replace")
