"""The file of addresses that a gateway follows."""

from pathlib import Path

from rillgate_server.gateway.addresses import AddressBook
from rillgate_server.replica.address_file import AddressFile


async def test_a_gateway_finds_what_is_in_the_file_now(tmp_path: Path) -> None:
    """From the first moment on, with none; a replica that moved is there once."""
    file = AddressFile(tmp_path / "replicas")
    book = AddressBook([file.source])
    assert await book.look() == ()
    file.add("replica-1", "10.0.0.6:4001")
    file.add("replica-0", "[fd00::5]:4002")
    assert await book.look() == ("[fd00::5]:4002", "10.0.0.6:4001")
    file.add("replica-1", "10.0.0.7:4003")
    file.remove("replica-0")
    file.remove("replica-0")
    assert await book.look() == ("10.0.0.7:4003",)
    file.remove("replica-1")
    assert await book.look() == ()


def test_it_remembers_that_there_was_one_and_leaves_one_file(tmp_path: Path) -> None:
    """What is written beside it takes its place."""
    file = AddressFile(tmp_path / "replicas")
    had_any = [file.had_any]
    file.add("replica-0", "10.0.0.6:4001")
    file.remove("replica-0")
    had_any.append(file.had_any)
    assert had_any == [False, True]
    assert [it.name for it in tmp_path.iterdir()] == ["replicas"]
