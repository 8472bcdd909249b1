"""A fake server and clients for it."""

from collections.abc import AsyncIterator, Iterator

import pytest

from rillgate import AsyncClient, Client
from rillgate.testing import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """Serve on a free port."""
    with FakeServer() as running:
        yield running


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    """Call the fake server from this thread."""
    with Client(server.target) as connected:
        yield connected


@pytest.fixture
async def async_client(server: FakeServer) -> AsyncIterator[AsyncClient]:
    """Call the fake server from this loop."""
    async with AsyncClient(server.target) as connected:
        yield connected
