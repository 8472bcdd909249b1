"""Where Ray put one rank: the actor that starts its process there, and ends it when cut off.

Owns the process and the lease that keeps it alive. A thread of its own watches the lease, by a
clock that goes on while the machine sleeps, and kills the process when it is over, whatever Ray,
the network or this actor's event loop do then. The process is on a leash, too: it dies with the
actor. Does not know the model: torch is imported in the process alone.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import ray

from rillgate_server.core.clock import Clock
from rillgate_server.replica.child import Child, ChildSpec
from rillgate_server.replica.lease import WorkerLease

_LOOK_S = 0.5  # at the lease, at least: waiting does not count while the machine sleeps


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What an actor says of the place that it is in."""

    ip: str
    """The machine's, as the cluster knows it."""
    node_id: str
    """Ray's."""
    free_port: int
    """For ranks to meet at; it was free a moment ago."""
    reading_s: float
    """Of the clock that the lease runs by."""


class SleeplessClock:
    """A monotonic clock that also counts while the machine is suspended."""

    def now(self) -> float:
        """Return CLOCK_BOOTTIME."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseGuard:
    """Watches a lease from a thread of its own, and calls `on_over` there. State: the lease."""

    def __init__(self, duration_s: float, clock: Clock, on_over: Callable[[], None]) -> None:
        """Begin lease and thread."""
        self._lease = WorkerLease(duration_s, clock)
        self._on_over = on_over
        self._lock = threading.Lock()  # of the lease
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lease", daemon=True)
        self._thread.start()

    def renew(self, reading_s: float) -> float | None:
        """Take a renewal; return the next reading, None when it came too late."""
        with self._lock:
            return self._lease.renew(reading_s)

    def close(self) -> None:
        """Watch no more."""
        self._is_closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_closed.wait(min(remaining_s := self._remaining_s(), _LOOK_S)):
            if remaining_s == 0.0:
                self._on_over()
                return

    def _remaining_s(self) -> float:
        with self._lock:
            return self._lease.remaining_s()


class RankHost:
    """Runs one rank's process; all methods on the actor's event loop.

    State: the lease's guard, the process, and whether it was fenced.
    """

    def __init__(self) -> None:
        """Start nothing yet."""
        self._guard: LeaseGuard | None = None
        self._child: Child | None = None
        self._ended: asyncio.Task[int] | None = None
        self._start_or_end = asyncio.Lock()
        self._fence_lock = threading.Lock()  # of the two below
        self._is_fenced = False
        self._process_fd: int | None = None  # names the process even once its number is another's

    async def open(self, lease_s: float) -> HostFacts:
        """Begin the lease, and say where this is."""
        self._guard = LeaseGuard(lease_s, clock := SleeplessClock(), self._fence)
        ip = ray.util.get_node_ip_address()
        node_id = ray.get_runtime_context().get_node_id()
        return HostFacts(ip, node_id, _free_port(ip), clock.now())

    async def renew(self, reading_s: float) -> float | None:
        """Take a renewal of the lease; return the next reading, None when it came too late."""
        assert self._guard is not None
        return self._guard.renew(reading_s)

    async def start(self, spec: ChildSpec, environment: Mapping[str, str]) -> None:
        """Start the process, by this machine's Python, with `environment`, too."""
        command = (sys.executable, *spec.command[1:])
        everything = {**spec.environment, **environment}
        async with self._start_or_end:
            child = await Child.start(replace(spec, command=command, environment=everything))
            with self._fence_lock:
                with contextlib.suppress(ProcessLookupError):  # it ended at once
                    self._process_fd = os.pidfd_open(child.pid)
                if self._is_fenced:
                    child.kill()
            self._child, self._ended = child, asyncio.create_task(child.wait())

    async def ready(self) -> tuple[str, str] | None:
        """Wait for READY; return its text and where it listens, None when it ended without."""
        assert self._child is not None
        await asyncio.wait([self._child.ready])
        if self._child.ready.cancelled():
            return None
        return self._child.ready.result(), self._child.listens_at

    async def wait(self) -> tuple[int, tuple[str, ...]]:
        """Wait for the process's end; return its exit code and its last lines."""
        assert self._child is not None
        assert self._ended is not None
        code = await asyncio.shield(self._ended)
        return code, tuple(self._child.last_lines)

    async def stop(self) -> bool:
        """Ask the process to end and wait; False when it had to be killed."""
        return self._child is None or await self._child.stop()

    async def end(self) -> None:
        """Kill the process, if there is one or will be, and return once it is gone."""
        async with self._start_or_end:
            self._fence()
            if self._ended is not None:
                await asyncio.wait([self._ended])
        if self._guard is not None:
            await asyncio.to_thread(self._guard.close)

    def _fence(self) -> None:
        """Kill the process at once, now or when it starts; on the lease's thread."""
        with self._fence_lock:
            self._is_fenced = True
            if self._process_fd is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._process_fd, signal.SIGKILL)


def _free_port(ip: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as probe:
        probe.bind((ip, 0))
        return int(probe.getsockname()[1])
