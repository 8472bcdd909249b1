"""Where replicas are: names with many addresses, files that change, and what is no address."""

import asyncio
import logging
import socket
from pathlib import Path
from typing import Any

import pytest

from rillgate_server.errors import ConfigError
from rillgate_server.gateway.addresses import AddressBook


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere", "'nowhere'; allowed: HOST:PORT"),
        ("host:0", "'host:0'; allowed: HOST:PORT with a port of 1 to 65535"),
        ("host:99999", "'host:99999'; allowed: HOST:PORT"),
        (":50061", "':50061'; allowed: HOST:PORT"),
        ("unix:", "'unix:' names no path; allowed: unix:PATH"),
        ("file:", "'file:' names no path; allowed: file:PATH"),
    ],
)
def test_what_is_no_address_is_refused_at_once(source: str, says: str) -> None:
    """The setting, the value and what is allowed."""
    with pytest.raises(ConfigError) as caught:
        AddressBook([source])
    assert str(caught.value).startswith("gateway.replica_addresses: ")
    assert says in str(caught.value)


async def test_addresses_stay_as_they_are_each_once() -> None:
    """Literals are not looked up; their order is kept."""
    sources = ["unix:/run/b.sock", "127.0.0.1:5", "[::1]:6", "unix:/run/b.sock"]
    assert await AddressBook(sources).look() == ("unix:/run/b.sock", "127.0.0.1:5", "[::1]:6")


class Resolver:
    """Stands for the name service."""

    def __init__(self) -> None:
        self.answers: dict[str, list[str]] = {}

    async def getaddrinfo(self, host: str, port: int, **_: Any) -> list[Any]:
        """Answer as the loop's method does."""
        if host not in self.answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (
                socket.AF_INET6 if ":" in it else socket.AF_INET,
                *(socket.SOCK_STREAM, 6, ""),
                (it, port),
            )
            for it in self.answers[host]
        ]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """A name service that says what a test wants."""
    it = Resolver()
    monkeypatch.setattr(
        asyncio.BaseEventLoop, "getaddrinfo", lambda _, *a, **k: it.getaddrinfo(*a, **k)
    )
    return it


async def test_a_name_stands_for_all_its_addresses_and_is_looked_up_again(
    resolver: Resolver,
) -> None:
    """A headless service: replicas come and go behind one name."""
    book = AddressBook(["replicas.svc:50061"])
    resolver.answers["replicas.svc"] = ["10.0.0.2", "10.0.0.1", "10.0.0.2"]
    assert await book.look() == ("10.0.0.1:50061", "10.0.0.2:50061")
    resolver.answers["replicas.svc"] = ["10.0.0.2", "10.0.0.3"]
    assert await book.look() == ("10.0.0.2:50061", "10.0.0.3:50061")


async def test_a_name_with_both_families_is_one_replica(resolver: Resolver) -> None:
    """As `localhost` is; with the newer one alone, that one is taken, in brackets."""
    resolver.answers = {"both": ["::1", "127.0.0.1"], "six": ["fd00::1"]}
    assert await AddressBook(["both:5", "six:5"]).look() == ("127.0.0.1:5", "[fd00::1]:5")


async def test_a_name_that_cannot_be_found_keeps_what_it_gave(
    resolver: Resolver, caplog: pytest.LogCaptureFixture
) -> None:
    """A name service that is down takes no replica away; it is said once."""
    book = AddressBook(["a:1", "b:1"])
    resolver.answers = {"a": ["10.0.0.1"], "b": ["10.0.0.2"]}
    assert await book.look() == ("10.0.0.1:1", "10.0.0.2:1")
    del resolver.answers["a"]
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert await book.look() == ("10.0.0.1:1", "10.0.0.2:1")
    (record,) = caplog.records
    assert "a:1 gives none: Name or service not known" in record.getMessage()


async def test_a_file_is_read_again_with_comments_and_empty_lines(tmp_path: Path) -> None:
    """One address per line; whoever writes it decides."""
    file = tmp_path / "replicas"
    file.write_text("# ours\n10.0.0.1:5\n\n  unix:/run/x.sock  # near\n")
    book = AddressBook([f"file:{file}", "10.0.0.9:5"])
    assert await book.look() == ("10.0.0.1:5", "unix:/run/x.sock", "10.0.0.9:5")
    file.write_text("10.0.0.2:5\n")
    assert await book.look() == ("10.0.0.2:5", "10.0.0.9:5")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("10.0.0.1:5\nnonsense\n", "'nonsense'; allowed: HOST:PORT"),
        ("file:/other\n", "is a file in a file"),
        (None, "No such file"),
    ],
)
async def test_a_bad_file_changes_nothing_and_is_said(
    tmp_path: Path, text: str | None, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of a bad file is not taken: what it gave before stays."""
    file = tmp_path / "replicas"
    file.write_text("10.0.0.1:5\n10.0.0.2:5\n")
    book = AddressBook([f"file:{file}"])
    before = await book.look()
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    assert await book.look() == before
    assert says in caplog.text
    file.write_text("10.0.0.3:5\n")
    assert await book.look() == ("10.0.0.3:5",)
