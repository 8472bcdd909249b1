"""Connections between rank 0 and each other rank of a split model: frames over plain TCP.

Plans go down and reports come up here rather than through torch.distributed: an idle rank waits for
a plan for ever, which no collective's timeout allows, and the end of a process is the end of its
connection, at once. Does not know what the frames say.

    frame   u32le length | bytes
"""

import socket
import struct

from rillgate_server.errors import RankLost

_HEADER = struct.Struct("<I")
_MAX_FRAME_BYTES = 1 << 30
"""A plan of a full queue of long prompts is a few megabytes."""


class RankLink:
    """One connection. One thread sends and receives; `shut` may come from any.

    State: the socket.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        """Own a connection to `name` (for messages)."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self.name = name

    def __repr__(self) -> str:
        """Show to whom."""
        return f"RankLink({self.name})"

    def send(self, data: bytes) -> None:
        """Send one frame. Raises RankLost."""
        try:
            self._socket.sendall(_HEADER.pack(len(data)) + data)
        except OSError as error:
            raise RankLost(f"{self.name} is gone: {error}") from error

    def receive(self, timeout_s: float | None = None, max_bytes: int = _MAX_FRAME_BYTES) -> bytes:
        """Wait for one frame. Raises RankLost, also when none came in time."""
        try:
            self._socket.settimeout(timeout_s)
            (length,) = _HEADER.unpack(self._read(_HEADER.size))
            if length > max_bytes:
                raise RankLost(f"{self.name} sent {length} bytes; allowed: {max_bytes}")
            return self._read(length)
        except TimeoutError as error:
            raise RankLost(f"{self.name} said nothing for {timeout_s} s") from error
        except OSError as error:
            raise RankLost(f"{self.name} is gone: {error}") from error
        finally:
            self._set_blocking()

    def wait_closed(self, timeout_s: float) -> bool:
        """Wait until the other side has closed; False when it did not in time."""
        try:
            self._socket.settimeout(timeout_s)
            return not self._socket.recv(1)
        except OSError as error:
            return not isinstance(error, TimeoutError)

    def shut(self) -> None:
        """Break the connection: whoever waits in `send` or `receive` gets RankLost."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # broken already

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def detach(self) -> socket.socket:
        """Give the bare connection away, to be used for something else."""
        return self._socket

    def _read(self, length: int) -> bytes:
        data = bytearray(length)
        view, done = memoryview(data), 0
        while done < length:
            count = self._socket.recv_into(view[done:])
            if not count:
                raise RankLost(f"{self.name} is gone: it has closed its connection")
            done += count
        return bytes(data)

    def _set_blocking(self) -> None:
        try:
            self._socket.settimeout(None)
        except OSError:
            return  # closed meanwhile
