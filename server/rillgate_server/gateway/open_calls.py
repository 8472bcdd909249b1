"""How many calls a gateway has open, and whether it takes new ones.

Owns the count and the drain. Does not know what the calls do.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from rillgate_server.errors import Draining


class OpenCalls:
    """The calls that are open now. State: the count, and whether it drains."""

    def __init__(self) -> None:
        """Start with none."""
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

    def drain(self) -> None:
        """Take no new calls from now on."""
        self.is_draining = True

    async def wait_none(self) -> None:
        """Wait until no call is open."""
        await self._none_open.wait()
