"""The file by which a gateway learns of replicas that come and go: an address per line.

Owns the file. Whoever reads it sees the old lines or the new ones, never a part of both.
"""

from pathlib import Path


class AddressFile:
    """State: the addresses, which are also in the file, and whether there ever was one."""

    def __init__(self, path: Path) -> None:
        """Make the file, with no address."""
        self._path = path
        self._addresses: dict[str, str] = {}  # replica's name -> address
        self.had_any = False
        """Whether there ever was one."""
        self._write()

    def __repr__(self) -> str:
        return f"AddressFile({self._path}, {self._addresses})"

    @property
    def source(self) -> str:
        """Return what gateway.replica_addresses says for it."""
        return f"file:{self._path.resolve()}"

    def add(self, name: str, address: str) -> None:
        """Add a replica, or move it."""
        self._addresses[name] = address
        self.had_any = True
        self._write()

    def remove(self, name: str) -> None:
        """Remove a replica, if it is there."""
        if self._addresses.pop(name, None) is not None:
            self._write()

    def _write(self) -> None:
        lines = [f"{address}  # {name}\n" for name, address in sorted(self._addresses.items())]
        fresh = self._path.with_suffix(".new")
        fresh.write_text("".join(lines), encoding="utf-8")
        fresh.replace(self._path)
