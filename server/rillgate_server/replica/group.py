"""Children that live and die together: the ranks of a replica, or a gateway by itself.

Owns the start of all, the end of all once one has ended, and whose end it was. Does not know when
they are started again (the supervisor does).

    ready   the first child's READY: rank 0 says it when all ranks are there
    stop    SIGTERM to the first child; the others have nothing left to do once it has ended
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from rillgate_server.replica.child import EXIT_OPERATOR, Child, ChildSpec


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """What to start together."""

    name: str
    """For messages."""
    children: tuple[ChildSpec, ...]
    """At least one."""
    fresh_environment: Callable[[], Mapping[str, str]] = dict
    """Called for every start: what all children get that no earlier start had."""


@dataclass(frozen=True, slots=True)
class GroupEnd:
    """How a group ended."""

    child: Child
    """Whose end was the cause."""
    code: int
    """Its exit code, minus the signal's number."""


class Group:
    """A started group; state: its children, which own theirs."""

    def __init__(self, spec: GroupSpec, children: tuple[Child, ...]) -> None:
        """Use `start`."""
        self.spec = spec
        self._children = children

    def __repr__(self) -> str:
        return f"Group({self.spec.name}, {list(self._children)})"

    @classmethod
    async def start(
        cls,
        spec: GroupSpec,
        pinned: Mapping[str, str],
        on_progress: Callable[[str, int, int], None],
    ) -> "Group":
        """Start every child, with `pinned` in its environment, too.

        `on_progress` gets a child's name and its bytes done and in all.
        """
        fresh = {**spec.fresh_environment(), **pinned}
        started: list[Child] = []
        try:
            for child in spec.children:

                def report(done: int, total: int, name: str = child.name) -> None:
                    on_progress(name, done, total)

                environment = {**child.environment, **fresh}
                started.append(await Child.start(replace(child, environment=environment), report))
        except BaseException:
            for other in started:
                other.kill()
            raise
        return cls(spec, tuple(started))

    @property
    def ready(self) -> "asyncio.Future[str]":
        """READY's text; cancelled when the group ends without."""
        return self._children[0].ready

    @property
    def ready_at_s(self) -> float | None:
        """When READY came (time.monotonic); None before."""
        return self._children[0].ready_at_s

    async def wait(self) -> GroupEnd:
        """Wait for the first end, kill the others, and say whose end was the cause."""
        waits = {asyncio.create_task(child.wait()): child for child in self._children}
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        self.kill()
        await asyncio.wait(waits)
        ends = [GroupEnd(child, task.result()) for task, child in waits.items()]
        first = next(end for end, task in zip(ends, waits, strict=True) if task in done)
        # One that refuses its settings takes the others with it; its own line says why.
        return next((end for end in ends if end.code == EXIT_OPERATOR), first)

    async def stop(self) -> bool:
        """Ask it to end and wait; False when it had to be killed."""
        return await self._children[0].stop()

    def kill(self) -> None:
        """End it at once."""
        for child in self._children:
            child.kill()
