"""Which addresses replicas have now: names are looked up and files read again and again.

    host:port   every address that the name has (a headless service, a DNS name per fleet)
    unix:PATH   itself
    file:PATH   an address per line, none of them a file; `#` begins a comment

Owns the reading and its errors. What becomes of an address that came or went is the fleet's.
"""

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from rillgate_server.errors import ConfigError

LOOK_AGAIN_S = 2.0
"""Between two looks at names and files."""
MAX_ADDRESSES = 1024
"""Of a file or a name; what comes after them is left out."""

_log = logging.getLogger(__name__)


class AddressBook:
    """Follows address sources.

    State: what each source last gave (kept while it cannot be read), and the complaint last logged.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        """Take what an operator wrote; raises ConfigError that names what is no address."""
        for source in sources:
            _check(source)
        self._sources = tuple(dict.fromkeys(sources))
        self._found: dict[str, tuple[str, ...]] = {}  # source -> addresses
        self._complaints: dict[str, str] = {}  # source -> what was logged

    def __repr__(self) -> str:
        return f"AddressBook({self._found})"

    async def look(self) -> tuple[str, ...]:
        """Return every address there is now, each once, in the sources' order."""
        for source in self._sources:
            try:
                self._found[source] = await _resolve(source)
                self._complaints.pop(source, None)
            except OSError as error:
                complaint = error.strerror or str(error)
                if self._complaints.get(source) != complaint:
                    self._complaints[source] = complaint
                    _log.warning("gateway.replica_addresses: %s gives none: %s", source, complaint)
        return tuple(dict.fromkeys(it for found in self._found.values() for it in found))

    async def follow(self) -> AsyncIterator[tuple[str, ...]]:
        """Yield the addresses now and after every further look. Never ends."""
        while True:
            yield await self.look()
            await asyncio.sleep(LOOK_AGAIN_S)


def _check(source: str) -> None:
    """Raise ConfigError for what can never be an address."""
    kind, _, path = source.partition(":")
    if kind in ("unix", "file"):
        if not path:
            raise ConfigError(
                f"gateway.replica_addresses: {source!r} names no path; allowed: {kind}:PATH"
            )
        return
    host, colon, port = source.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) <= 65535):
        raise ConfigError(
            f"gateway.replica_addresses: {source[:200]!r}; allowed: HOST:PORT with a port of 1 to "
            f"65535, unix:PATH or file:PATH"
        )


def _is_literal(source: str) -> bool:
    if source.startswith("file:"):
        return False
    if source.startswith("unix:"):
        return True
    host = source.rpartition(":")[0].removeprefix("[").removesuffix("]")
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return True
    return False


async def _resolve(source: str) -> tuple[str, ...]:
    """Return a source's addresses; raises OSError."""
    if source.startswith("file:"):
        return await _read(Path(source.removeprefix("file:")))
    if _is_literal(source):
        return (source,)
    host, _, port = source.rpartition(":")
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(
        host.removeprefix("[").removesuffix("]"), int(port), type=socket.SOCK_STREAM
    )
    # A name such as `localhost` has an address of each family for one and the same replica.
    family = socket.AF_INET if any(it[0] is socket.AF_INET for it in found) else socket.AF_INET6
    hosts = sorted({str(it[4][0]) for it in found if it[0] is family})[:MAX_ADDRESSES]
    return tuple(f"[{it}]:{port}" if ":" in it else f"{it}:{port}" for it in hosts)


async def _read(path: Path) -> tuple[str, ...]:
    """Return the addresses that a file lists; raises OSError where it cannot be read."""
    try:
        text = await asyncio.to_thread(path.read_text, encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OSError(f"it is no UTF-8 text: {error}") from error
    addresses: list[str] = []
    for line in text.splitlines():
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        try:
            _check(entry)
        except ConfigError as error:
            raise OSError(str(error)) from error
        if entry.startswith("file:"):
            raise OSError(f"{entry!r} is a file in a file; allowed: HOST:PORT or unix:PATH")
        addresses += await _resolve(entry)
    return tuple(addresses[:MAX_ADDRESSES])
