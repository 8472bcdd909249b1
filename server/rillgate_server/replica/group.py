"""Children that live and die together: the ranks of a replica, or a gateway by itself.

Owns the start of all, the end of all once one has ended, and whose end it was. Does not know when
they are started again (the supervisor does).

    ready   the first child's READY: rank 0 says it when all ranks are there
    stop    SIGTERM to the first child; the others have nothing left to do once it has ended
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from rillgate_server.replica.child import EXIT_OPERATOR, Child, ChildSpec, describe_exit
from rillgate_server.replica.unit import UnitEnd

_ORDERLY_END_S = 5.0  # rank 0 tells the others to end and then has little left to do itself


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """What to start together."""

    name: str
    """For messages."""
    children: tuple[ChildSpec, ...]
    """At least one."""
    fresh_environment: Callable[[], Mapping[str, str]] = dict
    """Called for every start: what all children get that no earlier start had."""

    @property
    def num_processes(self) -> int:
        """Count the children."""
        return len(self.children)

    @property
    def stop_grace_s(self) -> float:
        """Of the first child, which is asked to stop."""
        return self.children[0].stop_grace_s

    async def start(
        self, pinned: Mapping[str, str], on_progress: Callable[[str, int, int], None]
    ) -> "Group":
        """Start every child, with `pinned` in its environment, too."""
        fresh = {**self.fresh_environment(), **pinned}
        started: list[Child] = []
        try:
            for child in self.children:
                environment = {**child.environment, **fresh}
                report = partial(on_progress, child.name)
                started.append(await Child.start(replace(child, environment=environment), report))
        except BaseException:
            for other in started:
                other.kill()
            raise
        return Group(self.name, tuple(started))


class Group:
    """A started group; state: its children, which own theirs."""

    def __init__(self, name: str, children: tuple[Child, ...]) -> None:
        """Use GroupSpec.start."""
        self._name = name
        self._children = children

    def __repr__(self) -> str:
        return f"Group({self._name}, {list(self._children)})"

    @property
    def ready(self) -> "asyncio.Future[str]":
        """READY's text; cancelled when the group ends without."""
        return self._children[0].ready

    @property
    def ready_at_s(self) -> float | None:
        """When READY came (time.monotonic); None before."""
        return self._children[0].ready_at_s

    async def wait(self) -> UnitEnd:
        """Wait for the first end, kill the others, and say whose end was the cause."""
        waits = [asyncio.create_task(child.wait()) for child in self._children]
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if all(task.result() == 0 for task in done):
            await asyncio.wait(waits[:1], timeout=_ORDERLY_END_S)
        self.kill()
        await asyncio.wait(waits)
        first = next(index for index, task in enumerate(waits) if task in done)
        codes = [task.result() for task in waits]
        # One that refuses its settings takes the others with it; its own line says why.
        cause = codes.index(EXIT_OPERATOR) if EXIT_OPERATOR in codes else first
        child = self._children[cause]
        how = describe_exit(codes[cause])
        return UnitEnd(child.spec.name, how, codes[cause], tuple(child.last_lines))

    async def stop(self) -> bool:
        """Ask it to end and wait; False when it had to be killed."""
        return await self._children[0].stop()

    def kill(self) -> None:
        """End it at once."""
        for child in self._children:
            child.kill()
