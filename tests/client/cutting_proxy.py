"""A TCP proxy that cuts connections at random byte positions of what the server sends.

Owns its sockets and two threads per connection, and the seeded draws. What a bad network, or a
proxy on the way that is restarted again and again, looks like from both sides.
"""

import contextlib
import random
import socket
import struct
import threading
from types import TracebackType
from typing import Self


class CuttingProxy:
    """Forwards to one target; every connection ends after so many bytes of answers."""

    def __init__(self, target: str, seed: int, max_bytes: int) -> None:
        """Listen on a free port; cut each connection after 1 to `max_bytes` bytes of answers."""
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._random = random.Random(seed)
        self._max_bytes = max_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()  # a connection may come while everything is being closed
        self._sockets = [self._listener]
        self._is_closed = False
        self.num_cuts = 0
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
            for one in self._sockets:
                _cut(one, by_reset=False)

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
                        near.close()
                        far.close()
                        return
                    num_bytes = self._random.randint(1, self._max_bytes)
                    by_reset = self._random.random() < 0.5
                up, down = (near, far, None, False), (far, near, num_bytes, by_reset)
                for args in (up, down):
                    threading.Thread(target=self._forward, args=args, daemon=True).start()

    def _forward(
        self, source: socket.socket, sink: socket.socket, num_bytes: int | None, by_reset: bool
    ) -> None:
        """Pass bytes on; after `num_bytes` of them (None: never) cut both sides."""
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if num_bytes is not None:
                    data = data[:num_bytes]
                    num_bytes -= len(data)
                sink.sendall(data)
                if num_bytes == 0:
                    with self._lock:
                        self.num_cuts += 1
                    break
        for one in (source, sink):
            _cut(one, by_reset)


def _cut(one: socket.socket, by_reset: bool) -> None:
    """End a connection at once, with FIN or with RST."""
    with contextlib.suppress(OSError):
        if by_reset:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            one.shutdown(socket.SHUT_RDWR)
    one.close()
