"""One replica on a Ray cluster: placed, started, watched, and never alive twice.

Owns a replica's lives, one after another: a placement group with a bundle per rank, and an actor in
each (`ray_host`). Ray finds the room and says when an actor died; a life is never restarted by Ray
itself, which knows neither of leases nor that ranks belong together. When to start the next life is
the supervisor's.

    fence    wait until every lease of the last life is over
    place    placement group and actors; waits for room as long as it takes
    start    ranks, told where to meet and where to serve
    serve    the address goes into the gateway's file with READY; leases are renewed all the time
    end      a process ended, Ray lost an actor, or one has not answered for a lease
    release  all processes killed, as far as they can be reached; actors and group removed
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rillgate_server.core.clock import SystemClock
from rillgate_server.replica.address_file import AddressFile
from rillgate_server.replica.child import EXIT_OPERATOR, ChildSpec, describe_exit
from rillgate_server.replica.lease import LeaseGrant
from rillgate_server.replica.ray_host import HostFacts, RankHost
from rillgate_server.replica.unit import UnitEnd

_SAY_WAITING_S = 10.0  # for room in the cluster
_END_S = 3.0  # for an actor that is told to end its process
_ORDERLY_END_S = 5.0  # rank 0 tells the others to end and then has little left to do itself
_ALSO_END_S = 1.0  # ranks notice the end of one and end, too; which was the cause, their codes say


@dataclass(frozen=True, slots=True)
class RayPlan:
    """What to run for a replica, and what it needs."""

    name: str
    ranks: tuple[ChildSpec, ...]
    bundle: Mapping[str, float]
    """Resources of each rank: `CPU`, `GPU`."""
    lease_s: float
    max_memory_bytes: int
    """Of each rank; 0: as much of the machine's as its part of the cores."""


class RayReplica:
    """A unit of the supervisor. State: when the next life may start at the earliest."""

    def __init__(self, plan: RayPlan, addresses: AddressFile, say: Callable[[str], None]) -> None:
        """Take the plan and where addresses are told; starts nothing."""
        self.plan = plan
        self.addresses = addresses
        self.say = say
        self.fenced_at_s = 0.0  # of SystemClock

    def __repr__(self) -> str:
        return f"RayReplica({self.name}, fenced at {self.fenced_at_s:.3f} s)"

    @property
    def name(self) -> str:
        """For messages."""
        return self.plan.name

    @property
    def num_processes(self) -> int:
        """Count the ranks."""
        return len(self.plan.ranks)

    @property
    def stop_grace_s(self) -> float:
        """Of rank 0, which is asked to stop."""
        return self.plan.ranks[0].stop_grace_s

    async def start(
        self, pinned: Mapping[str, str], on_progress: Callable[[str, int, int], None]
    ) -> "RayLife":
        """Begin a life. Loading on other machines shows no progress here."""
        return RayLife(self, pinned)


@dataclass(slots=True)
class _Host:
    """One rank's actor; Any: Ray makes handles' methods up."""

    name: str
    actor: Any
    facts: HostFacts
    grant: LeaseGrant


class RayLife:
    """One life of a replica. State: its task, its actors and its placement group."""

    def __init__(self, replica: RayReplica, pinned: Mapping[str, str]) -> None:
        """Use RayReplica.start."""
        self.ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.ready_at_s: float | None = None
        self._replica = replica
        self._plan = replica.plan
        self._pinned = pinned
        self._clock = SystemClock()
        self._group: Any = None  # Ray's placement group
        self._actors: list[Any] = []
        self._hosts: list[_Host] = []
        self._is_ending = False
        self._task = asyncio.create_task(self._live())

    def __repr__(self) -> str:
        return f"RayLife({self._plan.name}, {[host.facts.ip for host in self._hosts]})"

    async def wait(self) -> UnitEnd:
        """Wait until all of it has ended, or was given up, and say whose end was the cause."""
        await asyncio.wait([self._task])
        return UnitEnd(self._plan.name, "killed") if self._task.cancelled() else self._task.result()

    async def stop(self) -> bool:
        """Ask rank 0 to end and wait; False when it had to be killed."""
        if not self._hosts:
            self.kill()
            await asyncio.wait([self._task])
            return True
        stopping = asyncio.ensure_future(self._hosts[0].actor.stop.remote())
        await asyncio.wait((stopping, self._task), return_when=asyncio.FIRST_COMPLETED)
        try:
            async with asyncio.timeout(_END_S):
                stopped: bool = await stopping
        except (RayError, TimeoutError):
            return True  # it is gone
        return stopped

    def kill(self) -> None:
        """End it at once."""
        if not self._is_ending:  # the release must not be cancelled
            self._is_ending = True
            self._task.cancel()

    async def _live(self) -> UnitEnd:
        try:
            await asyncio.sleep(self._replica.fenced_at_s - self._clock.now())
            await self._place()
            return await self._serve()
        except RayError as error:
            return UnitEnd(self._plan.name, _first_line(error))
        finally:
            self._is_ending = True
            self._replica.addresses.remove(self._plan.name)
            self.ready.cancel()
            await self._release()

    async def _place(self) -> None:
        """Have Ray find room, and begin the leases."""
        plan = self._plan
        self._group, self._actors = await asyncio.to_thread(_request_room, plan)
        opened = asyncio.gather(*(actor.open.remote(plan.lease_s) for actor in self._actors))
        _, waiting = await asyncio.wait([opened], timeout=_SAY_WAITING_S)
        if waiting:
            needs = ", ".join(f"{amount:g} {what}" for what, amount in plan.bundle.items())
            self._replica.say(
                f"{plan.name} waits for room in the Ray cluster: {len(plan.ranks)} x {needs}"
            )
        facts: list[HostFacts] = await opened
        for child, actor, fact in zip(plan.ranks, self._actors, facts, strict=True):
            grant = LeaseGrant(plan.lease_s, self._clock, fact.reading_s)
            self._hosts.append(_Host(f"{child.name} on {fact.ip}", actor, fact, grant))

    async def _serve(self) -> UnitEnd:
        """Start the ranks and keep their leases until the first of them ends."""
        renewals = [asyncio.create_task(self._keep_lease(host)) for host in self._hosts]
        running = asyncio.create_task(self._run())
        try:
            await asyncio.wait((*renewals, running), return_when=asyncio.FIRST_COMPLETED)
            first = next(task for task in (running, *renewals) if task.done())
            return first.result()
        finally:
            for task in (*renewals, running):
                task.cancel()
            await asyncio.gather(*renewals, running, return_exceptions=True)

    async def _run(self) -> UnitEnd:
        """Start the ranks, tell the gateway when they serve, and wait for the first end."""
        first = self._hosts[0].facts
        nodes = await asyncio.to_thread(ray.nodes)
        starts = []
        for host, child in zip(self._hosts, self._plan.ranks, strict=True):
            environment = {
                **self._pinned,
                "RILLGATE_REPLICA__LISTEN": f"{_host(first.ip)}:0",
                "RILLGATE_REPLICA__RENDEZVOUS": f"{_host(first.ip)}:{first.free_port}",
                "RILLGATE_REPLICA__MAX_MEMORY_BYTES": str(
                    self._plan.max_memory_bytes
                    or memory_share(nodes, host.facts.node_id, self._plan.bundle)
                ),
            }
            starts.append(host.actor.start.remote(child, environment))
        await asyncio.gather(*starts)
        announcing = asyncio.create_task(self._announce())
        try:
            return await self._wait_end()
        finally:
            announcing.cancel()

    async def _announce(self) -> None:
        try:
            said: tuple[str, str] | None = await self._hosts[0].actor.ready.remote()
        except RayError:
            return  # others find out why
        if said is not None and not self.ready.done():
            text, address = said
            self._replica.addresses.add(self._plan.name, address)
            self.ready_at_s = time.monotonic()
            self.ready.set_result(f"{text} at {address}")

    async def _wait_end(self) -> UnitEnd:
        """Wait for the first process that ends, and for rank 0 where another ended in order."""
        waits = [asyncio.ensure_future(host.actor.wait.remote()) for host in self._hosts]
        for wait in waits:  # those of other ranks may fail once nobody asks any more
            wait.add_done_callback(lambda it: it.cancelled() or it.exception())
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if all(task.exception() is None and task.result()[0] == 0 for task in done):
            await asyncio.wait(waits[:1], timeout=_ORDERLY_END_S)
        else:
            self._replica.addresses.remove(self._plan.name)
            await asyncio.wait(waits, timeout=_ALSO_END_S)
        causes = [it for it in waits if it.done() and _code(it) == EXIT_OPERATOR]
        cause = causes[0] if causes else next(it for it in waits if it in done)
        code, last_lines = cause.result()
        last = last_lines[-1].removeprefix("rillgate: ") if last_lines else ""
        name = self._hosts[waits.index(cause)].name
        how = f"{describe_exit(code)}: {last}" if last else describe_exit(code)
        if code == EXIT_OPERATOR and self._replica.addresses.had_any:
            code = None  # others could be started: it is this machine that lacks something
        return UnitEnd(name, how, code, last_lines, unsaid=f"{name}: {last}")

    async def _keep_lease(self, host: _Host) -> UnitEnd:
        """Renew a lease until the worker is lost."""
        grant = host.grant
        while grant.patience_s > 0.0:
            next_s = self._clock.now() + grant.renew_every_s
            try:
                async with asyncio.timeout(grant.patience_s):
                    reading_s = await host.actor.renew.remote(grant.send())
            except (TimeoutError, ActorUnavailableError):
                pass  # patience ends by itself
            else:
                if reading_s is None:
                    return UnitEnd(host.name, "its lease was over before it could be renewed")
                grant.note_answer(reading_s)
            # Late answers are followed by the next renewal at once: it names a younger reading.
            await asyncio.sleep(next_s - self._clock.now())
        return UnitEnd(host.name, f"no answer for {self._plan.lease_s:g} s")

    async def _release(self) -> None:
        """Kill what can be reached, and note from when on the rest can live no more."""
        ends = (_end(host) for host in self._hosts)
        results = await asyncio.gather(*ends, return_exceptions=True)
        for host, result in zip(self._hosts, results, strict=True):
            if result is None:
                host.grant.note_end()
            self._replica.fenced_at_s = max(self._replica.fenced_at_s, host.grant.fenced_at_s)
        await asyncio.to_thread(_give_up_room, self._group, self._actors)


async def _end(host: _Host) -> None:
    async with asyncio.timeout(_END_S):
        await host.actor.end.remote()


def memory_share(
    nodes: Sequence[Mapping[str, Any]], node_id: str, bundle: Mapping[str, float]
) -> int:
    """Return the part of a machine's memory that goes with a bundle's part of its cores or GPUs.

    `nodes` as ray.nodes() gives them. 0, no limit, for a machine that is not among them any more.
    """
    what = "GPU" if "GPU" in bundle else "CPU"
    for node in nodes:
        if node["NodeID"] == node_id:
            has = node["Resources"]
            return int(has.get("memory", 0.0) * min(1.0, bundle[what] / has.get(what, 1.0)))
    return 0


def _request_room(plan: RayPlan) -> tuple[Any, list[Any]]:
    """Ask Ray for a placement group and for actors in it; both may come later."""
    group = placement_group([dict(plan.bundle) for _ in plan.ranks], strategy="PACK")
    host = ray.remote(RankHost)
    actors = [
        host.options(
            num_cpus=plan.bundle["CPU"],
            num_gpus=plan.bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
            max_restarts=0,
        ).remote()
        for index in range(len(plan.ranks))
    ]
    return group, actors


def _give_up_room(group: Any, actors: Sequence[Any]) -> None:
    with contextlib.suppress(RayError):  # the cluster is gone, and they with it
        for actor in actors:
            ray.kill(actor)
        if group is not None:
            remove_placement_group(group)


def _code(wait: "asyncio.Future[tuple[int, tuple[str, ...]]]") -> int | None:
    """Return the exit code that a host's `wait` brought, if it did."""
    return None if wait.exception() else wait.result()[0]


def _host(ip: str) -> str:
    """Write an address's host."""
    return f"[{ip}]" if ":" in ip else ip


def _first_line(error: RayError) -> str:
    """Say in one line what Ray says in many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"
