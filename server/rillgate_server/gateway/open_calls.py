"""How many calls a gateway has open, how often each may write, and whether it takes new ones.

Owns the count, the frame that follows from it, and the drain. Does not know what the calls do.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from rillgate_server.errors import Draining

_FRAME_S_PER_STREAM = 0.002


class OpenCalls:
    """The calls that are open now. State: the count, and whether it drains."""

    def __init__(self, max_frame_s: float = 0.0) -> None:
        """Start with none; see `frame_s`."""
        self._max_frame_s = max_frame_s
        self.num_open = 0
        self.is_draining = False
        self._none_open = asyncio.Event()
        self._none_open.set()

    def __repr__(self) -> str:
        return f"OpenCalls(num_open={self.num_open}, draining={self.is_draining})"

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Count a call for as long as the block runs; raises Draining when none is taken."""
        if self.is_draining:
            raise Draining("this server is going down and takes no new requests")
        self.num_open += 1
        self._none_open.clear()
        try:
            yield
        finally:
            self.num_open -= 1
            if self.num_open == 0:
                self._none_open.set()

    def frame_s(self) -> float:
        """Return the least time between two messages of a stream: all streams together write at
        most 500 a second, some 0.15 s of processor time here and as much at a caller in Python,
        until the frame is as long as it may be."""
        return min(self._max_frame_s, self.num_open * _FRAME_S_PER_STREAM)

    def drain(self) -> None:
        """Take no new calls from now on."""
        self.is_draining = True

    async def wait_none(self) -> None:
        """Wait until no call is open."""
        await self._none_open.wait()
