"""Nodes of a Ray cluster: started by a test, on this machine or another, and ended with it.

Owns `ray start` of a node, how soon the cluster notices that one is gone, and what runs on it. Does
not import Ray: its processes are somebody else's, as they are for a user.
"""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from importlib.util import find_spec
from typing import Protocol

import psutil

from tests.support.served import NAME, START_S, STOP_S
from tests.support.two_machines import wait_line

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Gone after some 3 s without an answer, instead of half a minute.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
_STARTED = "Ray runtime started"
_HEAD_STARTED = r"ray start --address='(\S+)'"
_POLL_S = 0.02


def why_no_ray() -> str:
    """Say why there can be no cluster; empty: there can."""
    return "" if find_spec("ray") else "ray is not installed (the extra `ray`)"


class Start(Protocol):
    """Starts a process somewhere."""

    def __call__(
        self, *command: str, environment: dict[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        """Return it, with its output in a pipe."""
        ...


def start_here(*command: str, environment: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    """Start a process on this machine."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
    )


class RayNode:
    """One node: a raylet, its helpers, and whatever Ray puts there."""

    def __init__(self, process: "subprocess.Popen[str]", address: str) -> None:
        """Use `ray_node`."""
        self.process = process
        self.address = address
        """Of the cluster, if this is its head."""

    def raylet(self) -> psutil.Process:
        """Return the process without which the node is none."""
        found = psutil.Process(self.process.pid).children()
        return next(it for it in found if it.name() == "raylet")

    def hosts(self) -> list[psutil.Process]:
        """Return the actors that run ranks."""
        return [it for it in self.raylet().children() if _title(it).startswith("ray::RankHost")]

    def replicas(self) -> dict[str, psutil.Process]:
        """Map name -> process of the replicas here."""
        found = {}
        for host in self.hosts():
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended as we looked
                found.update({it.environ()[NAME]: it for it in host.children()})
        return found


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


@contextlib.asynccontextmanager
async def ray_node(start: Start, *flags: str) -> AsyncIterator[RayNode]:
    """Start a node, and end all of it afterwards."""
    folder = tempfile.mkdtemp(prefix="rg-ray-", dir="/tmp")  # sockets' paths must be short
    process = start(
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-gpus=0"),
        *("--disable-usage-stats", "--object-store-memory=80000000"),
        *(f"--temp-dir={folder}", *flags),
        environment=ENVIRONMENT,
    )
    try:
        if "--head" in flags:
            yield RayNode(process, (await wait_line(process, _HEAD_STARTED)).group(1))
        else:
            await wait_line(process, _STARTED)
            yield RayNode(process, "")
    finally:
        await asyncio.to_thread(_end, process)
        shutil.rmtree(folder)


def _end(process: "subprocess.Popen[str]") -> None:
    """Kill all of a node: in order it would wait half a minute for what it runs."""
    own = []
    with contextlib.suppress(psutil.NoSuchProcess):
        own = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(STOP_S)
    for other in own:
        with contextlib.suppress(psutil.NoSuchProcess):
            other.kill()
    psutil.wait_procs(own, STOP_S)
    assert process.stdout is not None
    process.stdout.close()


def lives(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


async def until(condition: Callable[[], bool]) -> None:
    """Poll processes, which bring no event."""
    async with asyncio.timeout(START_S):
        while not condition():  # noqa: ASYNC110 - no event crosses
            await asyncio.sleep(_POLL_S)
