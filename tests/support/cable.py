"""A way between two ends of TCP that can be cut: both sides stay open, and hear nothing any more.

What a host looks like that lost its power or its network: no FIN, no RST.
"""

import asyncio
import contextlib
from types import TracebackType
from typing import Self


class Cable:
    """Leads from a port of its own to one target. State: its connections, whether it is cut."""

    def __init__(self, target: str) -> None:
        """Lead to `target`, HOST:PORT, once entered."""
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._is_cut = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []
        self.address = ""
        """Where it begins."""

    async def __aenter__(self) -> Self:
        """Take connections."""
        self._server = await asyncio.start_server(self._lead, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End all connections."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Let nothing pass any more, the end of a connection included."""
        self._is_cut = True

    async def _lead(
        self, near_reader: asyncio.StreamReader, near_writer: asyncio.StreamWriter
    ) -> None:
        self._writers.append(near_writer)
        far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        self._writers.append(far_writer)
        for reader, writer in ((near_reader, far_writer), (far_reader, near_writer)):
            self._tasks.add(asyncio.create_task(self._carry(reader, writer)))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while (data := await reader.read(65536)) and not self._is_cut:
                writer.write(data)
                await writer.drain()
        if not self._is_cut:
            writer.close()
