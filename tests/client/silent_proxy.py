"""A TCP proxy that can fall silent: connections stay open and nothing passes.

Owns its sockets and two threads per connection. What a vanished machine or a broken firewall looks
like from the other side.
"""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self


class SilentProxy:
    """Forwards to one target until `fall_silent()`."""

    def __init__(self, target: str) -> None:
        """Listen on a free port of this machine."""
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._is_silent = threading.Event()
        self._lock = threading.Lock()  # a connection may come while everything is being closed
        self._is_closed = False
        self._sockets = [self._listener]
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        """Give the proxy itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close every connection."""
        with self._lock:
            self._is_closed = True
            _close(self._sockets)

    def fall_silent(self) -> None:
        """Swallow everything from now on, and take no new connection's bytes."""
        self._is_silent.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()
                    continue
                with self._lock:
                    self._sockets += [near, far]
                    if self._is_closed:
                        _close([near, far])
                        return
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self._is_silent.is_set():
                    sink.sendall(data)


def _close(sockets: list[socket.socket]) -> None:
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()
