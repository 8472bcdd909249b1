"""Notices that another rank died or hangs, whatever this one's other threads are doing.

A thread with connections of its own, over which heartbeats go both ways: the end of a connection is
a death, a silence of some seconds a hang (a stopped process, a cut network). Neither an idle rank,
which waits for a plan for ever, nor one inside a collective, which waits for its peers in C, would
ever tell. Does not know plans, nor what is to be done about a loss.

Silence is counted in this thread's own beats, not by the clock: a process that was stopped itself,
or a machine that slept, does not blame the others for the time it missed.
"""

import os
import selectors
import socket
import sys
import time
from collections.abc import Callable, Mapping
from threading import Lock, Thread

from rillgate_server.errors import RankLost

HEARTBEAT_S = 0.5
MAX_SILENT_BEATS = 10
"""5 s: a process on a busy machine is seldom kept from running for one, never for five."""

_BEAT = b"."
OnLost = Callable[[RankLost], None]


def end_process(error: RankLost) -> None:
    """End this process at once: a thread of it may be in a collective that never returns."""
    print(f"rillgate: {error}", file=sys.stderr, flush=True)
    os._exit(1)


class RankWatch:
    """Watches all ranks that this one talks to, until `stop` or the first loss.

    State, by thread:
        own         the sockets, `_silent_beats`
        any, locked `_on_lost` (who hears of a loss), `_lost` (the first one)
    """

    def __init__(self, connections: Mapping[int, socket.socket], on_lost: OnLost) -> None:
        """Watch `connections`, by rank; nothing happens before `start`.

        `on_lost` is called once, on the watching thread.
        """
        self._connections = dict(connections)
        self._silent_beats = dict.fromkeys(connections, 0)  # rank -> beats
        self._lock = Lock()
        self._on_lost = on_lost
        self._lost: RankLost | None = None
        self._wake, self._woken = socket.socketpair()
        self._thread = Thread(target=self._run, name="rillgate-ranks", daemon=True)

    def __repr__(self) -> str:
        """Show who is watched."""
        return f"RankWatch(ranks={list(self._connections)}, lost={self._lost})"

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def call_on_loss(self, on_lost: OnLost) -> None:
        """Tell somebody else from now on; at once if a rank is lost already."""
        with self._lock:
            self._on_lost = on_lost
            lost = self._lost
        if lost is not None:
            on_lost(lost)

    def stop(self) -> None:
        """End the watch. Its connections stay open until `close`: to the others their end would
        mean that this rank died."""
        self._wake.send(_BEAT)
        self._thread.join()

    def close(self) -> None:
        """Close the connections, after `stop`."""
        for connection in (*self._connections.values(), self._wake, self._woken):
            connection.close()

    def _run(self) -> None:
        try:
            self._watch()
        except RankLost as error:
            with self._lock:
                self._lost, on_lost = error, self._on_lost
            on_lost(error)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                connection.setblocking(False)
                selector.register(connection, selectors.EVENT_READ, rank)
            selector.register(self._woken, selectors.EVENT_READ, None)
            due_s = time.monotonic()
            while True:
                for key, _ in selector.select(max(0.0, due_s - time.monotonic())):
                    if key.data is None:
                        return
                    self._hear(key.data)
                if time.monotonic() >= due_s:
                    self._beat()
                    due_s = time.monotonic() + HEARTBEAT_S

    def _hear(self, rank: int) -> None:
        try:
            heard = self._connections[rank].recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            raise RankLost(f"rank {rank} is gone: {error}") from error
        if not heard:
            raise RankLost(f"rank {rank} is gone: its connection has ended")
        self._silent_beats[rank] = 0

    def _beat(self) -> None:
        for rank, connection in self._connections.items():
            try:
                connection.send(_BEAT)
            except BlockingIOError:
                pass  # it does not read: its silence will tell
            except OSError as error:
                raise RankLost(f"rank {rank} is gone: {error}") from error
            self._silent_beats[rank] += 1
            if self._silent_beats[rank] > MAX_SILENT_BEATS:
                silence_s = MAX_SILENT_BEATS * HEARTBEAT_S
                raise RankLost(f"rank {rank} hangs: it has been silent for {silence_s:.0f} s")
