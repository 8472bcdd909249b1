"""Lets a test reach into another network namespace: a Unix socket there and here, TCP inside.

    python -m tests.support.forward SOCKET HOST:PORT

Says FORWARDING once it listens. A connection that ends on one side ends on the other.
"""

import asyncio
import contextlib
import sys


async def forward(socket: str, target: str) -> None:
    """Serve for ever."""
    host, _, port = target.rpartition(":")

    async def on_connection(
        near_reader: asyncio.StreamReader, near_writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            ways = (_pump(near_reader, far_writer), _pump(far_reader, near_writer))
            tasks = [asyncio.create_task(way) for way in ways]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            far_writer.close()
        near_writer.close()

    async with await asyncio.start_unix_server(on_connection, socket) as server:
        print("FORWARDING", flush=True)
        await server.serve_forever()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


if __name__ == "__main__":
    asyncio.run(forward(*sys.argv[1:]))
