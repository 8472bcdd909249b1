"""What a supervisor keeps alive: something that starts, says that it serves, and ends as a whole.

Only the shape, and how an end is told. `group` is one on this machine, `ray_replica` one on
whatever machines Ray finds room on.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class UnitEnd:
    """How one life of a unit ended."""

    name: str
    """Of the part whose end was the cause."""
    how: str
    """In words."""
    code: int | None = None
    """Exit code of its process, minus the signal's number; None where no process told."""
    last_lines: tuple[str, ...] = ()
    """Of its stderr."""
    unsaid: str = ""
    """What it told the operator, where nobody has passed that on."""


class RunningUnit(Protocol):
    """One life of a unit."""

    @property
    def ready(self) -> "asyncio.Future[str]":
        """READY's text; cancelled when it ends without."""
        ...

    @property
    def ready_at_s(self) -> float | None:
        """When READY came (time.monotonic); None before."""
        ...

    async def wait(self) -> UnitEnd:
        """Wait until all of it has ended, and say whose end was the cause."""
        ...

    async def stop(self) -> bool:
        """Ask it to end and wait; False when it had to be killed."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


class Unit(Protocol):
    """What can be started again and again, one life at a time."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def num_processes(self) -> int:
        """Of each life."""
        ...

    @property
    def stop_grace_s(self) -> float:
        """How long `stop` waits before it kills."""
        ...

    async def start(
        self, pinned: Mapping[str, str], on_progress: Callable[[str, int, int], None]
    ) -> RunningUnit:
        """Begin a life, soon: what takes long is the life's.

        `pinned` goes into the environment of all its processes, `on_progress` gets a process's name
        and the bytes that it has loaded and will have loaded.
        """
        ...
