"""`rillgate serve` in a process of its own, as its users run it, and what it writes."""

import asyncio
import contextlib
import os
import re
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence

import psutil

START_S = 100.0
"""For a start that imports torch, on a machine that may be busy."""
STOP_S = 30.0
NAME = "RILLGATE_REPLICA__NAME"
GATEWAY = "gateway"
READY = re.compile(r"rillgate: serving demo .* on (\S+) \(ready after")


class Server:
    """A running `rillgate serve`, and what it has written."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self._changed = asyncio.Condition()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        while line := await self.process.stderr.readline():
            async with self._changed:
                self.lines.append(line.decode().rstrip())
                self._changed.notify_all()

    async def wait_line(self, pattern: re.Pattern[str], start: int = 0) -> re.Match[str]:
        """Wait for a line on stderr, from the `start`th on."""
        async with asyncio.timeout(START_S), self._changed:
            while True:
                for line in self.lines[start:]:
                    if match := pattern.search(line):
                        return match
                await self._changed.wait()

    def children(self) -> dict[str, psutil.Process]:
        """Map `gateway` or the replica's name -> process."""
        found = psutil.Process(self.process.pid).children()
        return {child.environ().get(NAME) or child.cmdline()[3]: child for child in found}

    async def wait_exit(self) -> int:
        """Wait for the end, and for its last line."""
        code = await asyncio.wait_for(self.process.wait(), START_S)
        await asyncio.wait_for(self._reader, START_S)
        return code


@contextlib.asynccontextmanager
async def serve(*flags: str, through: Sequence[str] = ()) -> AsyncIterator[Server]:
    """Start `rillgate serve` on a free port, and leave nothing behind.

    `through`: a command that becomes the one that follows it, elsewhere.
    """
    process = await asyncio.create_subprocess_exec(
        *(
            *through,
            sys.executable,
            "-m",
            "rillgate_server.cli",
            "serve",
            "--listen",
            "127.0.0.1:0",
        ),
        *flags,
        stderr=PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield Server(process)
    finally:
        for end in (process.terminate, process.kill):  # the first one also removes its folder
            with contextlib.suppress(ProcessLookupError, TimeoutError):
                end()
                await asyncio.wait_for(process.wait(), STOP_S)
