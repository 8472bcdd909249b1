"""Rillgate's processes as these benchmarks start them: whole servers, or a gateway over fakes.

Owns their life: started, ready, gone at the end whatever happens.
"""

import asyncio
import contextlib
import os
import re
import sys
import tempfile
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil

from rillgate import AsyncClient
from rillgate.status_types import ServerStatus

START_S, STOP_S = 120.0, 30.0
"""Limits, for a machine that is busy."""
COMMAND = (sys.executable, "-m", "rillgate_server.cli")
FREE_PORT = ("--listen", "127.0.0.1:0")
_SERVE_READY = re.compile(r"rillgate: serving .* on (\S+) \(ready after")
_READY = re.compile(r"^READY (\S+)")
_POLL_S = 0.05


class Running:
    """A process that has said that it is ready, and where it is reached.

    State: the reader that empties its output, so that it is never held up.
    """

    def __init__(self, process: Process, address: str) -> None:
        self.process = process
        self.address = address

    def replica(self, name: str) -> psutil.Process:
        """Return a server's replica by the name that its socket has, too."""
        for child in psutil.Process(self.process.pid).children():
            if child.environ().get("RILLGATE_REPLICA__NAME") == name:
                return child
        raise LookupError(f"no replica {name}")


@contextlib.asynccontextmanager
async def started(*command: str, ready: re.Pattern[str] = _READY) -> AsyncIterator[Running]:
    """Start a process and wait until it says that it is ready; end it afterwards."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=PIPE, stderr=STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    reader: asyncio.Task[bytes] | None = None
    try:
        lines: list[str] = []
        async with asyncio.timeout(START_S):
            while not lines or not (match := ready.search(lines[-1])):
                line = await process.stdout.readline()
                if not line:
                    raise RuntimeError(f"{' '.join(command)} ended:\n" + "".join(lines))
                lines.append(line.decode())
        reader = asyncio.create_task(process.stdout.read())
        yield Running(process, match.group(1))
    finally:
        for end in (process.terminate, process.kill):  # the first one also ends its children
            with contextlib.suppress(ProcessLookupError, TimeoutError):
                end()
                async with asyncio.timeout(STOP_S):
                    await process.wait()
        if reader is not None:
            await reader


@contextlib.asynccontextmanager
async def serve(*flags: str) -> AsyncIterator[Running]:
    """Run `rillgate serve` on a free port."""
    async with started(*COMMAND, "serve", *FREE_PORT, *flags, ready=_SERVE_READY) as server:
        yield server


@contextlib.asynccontextmanager
async def gateways_over_fakes(step_ms: float) -> AsyncIterator[tuple[Running, Running]]:
    """Run two fake replicas, a gateway over the first and one over both."""
    async with contextlib.AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rillgate-")))
        addresses: list[str] = []
        for name in ("one", "other"):
            socket = str(directory / f"{name}.sock")
            fake = ("-m", "benchmarks.replicas.fake_replica", socket, str(step_ms))
            await stack.enter_async_context(started(sys.executable, *fake))
            addresses += ["--replica-address", f"unix:{socket}"]
        one, two = [
            await stack.enter_async_context(started(*COMMAND, "gateway", *FREE_PORT, *part))
            for part in (addresses[:2], addresses)
        ]
        yield one, two


async def wait_status(client: AsyncClient, condition: Callable[[ServerStatus], bool]) -> None:
    """Ask for the status until it is as wanted; it is as old as the last Loads, up to 200 ms."""
    async with asyncio.timeout(START_S):
        while True:
            if condition(await client.status()):
                return
            await asyncio.sleep(_POLL_S)
