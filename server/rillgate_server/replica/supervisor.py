"""Keeps a gateway and its replicas alive, and stops them in order.

Owns what lives, how often it crashed, and when serving is over. Needs neither torch nor gRPC, so
that it survives whatever they do. Children are started by exec (never by fork alone: after gRPC or
torch have threads that is not safe) and die with it, on a leash.

    start    all side by side (callers get UNAVAILABLE until the first replica is there)
    crash    the same unit again, with back-off; the others go on
    SIGTERM  gateway (it drains), then all replicas; a second signal kills them
    over     the gateway, or every replica, crashes again and again
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from rillgate_server.replica.child import EXIT_CRASHED, EXIT_OPERATOR
from rillgate_server.replica.restarts import RestartPolicy
from rillgate_server.replica.unit import RunningUnit, Unit, UnitEnd

EXIT_KILLED = 130


class GaveUp(Exception):
    """Serving is over; the exit code says whose fault it was."""

    def __init__(self, exit_code: int, message: str = "") -> None:
        """Take what to say (empty: the child has said it) and the exit code."""
        self.exit_code = exit_code
        super().__init__(message)


class Supervisor:
    """Keeps units alive until it is told to stop.

    State: `_living` (name -> the unit's life), the first READY of each, quick crashes, loads under
    way, whether serving was announced, whether it is stopping.
    """

    def __init__(
        self,
        gateway: Unit,
        replicas: Sequence[Unit],
        policy: RestartPolicy,
        on_ready: Callable[[dict[str, str]], None],
        say: Callable[[str], None],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Supervise a gateway and its replicas; none: those are elsewhere.

        `on_ready` gets name -> READY's text, once, with the gateway and the first replica;
        `on_progress` the bytes that all have loaded.
        """
        self._gateway = gateway
        self._replicas = replicas
        self._policy = policy
        self._on_ready = on_ready
        self._say = say
        self._on_progress = on_progress
        self._living: dict[str, RunningUnit] = {}  # name -> life
        self._ready_texts: dict[str, str] = {}  # name -> text of its first READY
        self._pinned: dict[str, dict[str, str]] = {}  # name -> environment of its next lives
        self._quick_crashes: dict[str, int] = {}  # name -> in a row
        self._loads: dict[str, tuple[int, int]] = {}  # child's name -> bytes done, in all
        self._is_announced = False
        self._stop = asyncio.Event()
        self._num_signals = 0

    def __repr__(self) -> str:
        return f"Supervisor({list(self._living.values())}, stopping={self._stop.is_set()})"

    def pin(self, name: str, environment: dict[str, str]) -> None:
        """Give a unit `environment`, too, whenever it is started again."""
        self._pinned[name] = environment

    def request_stop(self) -> None:
        """Begin to stop; asked a second time, kill."""
        self._num_signals += 1
        self._stop.set()
        if self._num_signals > 1:
            self._kill()

    async def run(self) -> int:
        """Serve until stopped; return the exit code. No child outlives this call."""
        keepers = [
            asyncio.create_task(self._keep(unit)) for unit in (*self._replicas, self._gateway)
        ]
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((*keepers, stopped), return_when=asyncio.FIRST_COMPLETED)
            gave_up = next((task.exception() for task in keepers if task.done()), None)
            await self._stop_all()
            if self._num_signals > 1:
                return EXIT_KILLED
            if isinstance(gave_up, GaveUp):
                if str(gave_up):
                    self._say(str(gave_up))
                return gave_up.exit_code
            if gave_up is not None:
                raise gave_up
            return 0
        finally:
            self._stop.set()
            self._kill()
            await asyncio.gather(*keepers, stopped, return_exceptions=True)

    async def _keep(self, unit: Unit) -> None:
        """Start a unit, again and again; returns when stopping, raises GaveUp."""
        name = unit.name
        while not self._stop.is_set():
            life = await unit.start(self._pinned.get(name, {}), self._note_progress)
            self._living[name] = life
            if self._stop.is_set():  # told so while the processes were being made
                life.kill()
            life.ready.add_done_callback(lambda ready: self._note_ready(name, ready))
            end = await life.wait()
            del self._living[name]
            if self._stop.is_set():
                return
            delay_s = self._judge(unit, life, end)
            self._say(
                f"{end.name} died ({end.how}); starting "
                f"{'it' if unit.num_processes == 1 else f'all ranks of {name}'} again in "
                f"{delay_s:g} s"
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._stop.wait()

    def _judge(self, unit: Unit, life: RunningUnit, end: UnitEnd) -> float:
        """Return how long to wait before the next start; raises GaveUp."""
        if end.code == EXIT_OPERATOR:
            raise GaveUp(EXIT_OPERATOR, end.unsaid)
        name = unit.name
        served_s = 0.0 if life.ready_at_s is None else time.monotonic() - life.ready_at_s
        quick_crashes = self._policy.count(self._quick_crashes.get(name, 0), served_s)
        self._quick_crashes[name] = quick_crashes
        others = [] if unit is self._gateway else self._crashes_of_others(name)
        if self._policy.gives_up(quick_crashes, others):
            raise GaveUp(EXIT_CRASHED, _epitaph(end, quick_crashes))
        return self._policy.delay_s(quick_crashes)

    def _crashes_of_others(self, name: str) -> list[int]:
        """Return the quick crashes of each other replica, none of one that serves."""
        elsewhere = [0] if self._policy.has_others_elsewhere else []
        return elsewhere + [
            0 if self._serves(unit.name) else self._quick_crashes.get(unit.name, 0)
            for unit in self._replicas
            if unit.name != name
        ]

    def _serves(self, name: str) -> bool:
        life = self._living.get(name)
        return life is not None and life.ready_at_s is not None

    def _note_ready(self, name: str, ready: "asyncio.Future[str]") -> None:
        if ready.cancelled():
            return
        if name in self._ready_texts:
            self._say(f"{name} serves again: {ready.result()}")
            return
        self._ready_texts[name] = ready.result()
        if len(self._replicas) > 1 and name != self._gateway.name:
            self._say(f"{name} serves")
        has_replica = not self._replicas or len(self._ready_texts) > 1
        if self._gateway.name in self._ready_texts and has_replica and not self._is_announced:
            self._is_announced = True
            self._on_ready(dict(self._ready_texts))

    def _note_progress(self, name: str, done: int, total: int) -> None:
        """Show the sum of all loads; once all are done the next one begins anew."""
        self._loads[name] = (done, total)
        sums = [sum(column) for column in zip(*self._loads.values(), strict=True)]
        self._on_progress(sums[0], sums[1])
        if sums[0] >= sums[1]:
            self._loads.clear()

    async def _stop_all(self) -> None:
        """Stop the gateway, and once it has drained all replicas side by side."""
        self._stop.set()
        await self._stop_unit(self._gateway)
        await asyncio.gather(*map(self._stop_unit, self._replicas))

    async def _stop_unit(self, unit: Unit) -> None:
        life = self._living.get(unit.name)
        if life is not None and not await life.stop() and self._num_signals < 2:
            self._say(f"{unit.name} did not stop within {unit.stop_grace_s:g} s; killed")

    def _kill(self) -> None:
        for life in self._living.values():
            life.kill()


def _epitaph(end: UnitEnd, quick_crashes: int) -> str:
    lines = [
        f"{end.name} died {quick_crashes} times in a row soon after its start, "
        f"the last time with {end.how}; giving up. Its last lines:",
        *(f"    {line}" for line in end.last_lines),
    ]
    return "\n".join(lines)
