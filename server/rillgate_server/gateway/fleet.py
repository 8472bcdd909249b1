"""The replicas behind a gateway: a link to each address, and the router's view of them.

Owns the links and when they come and go; tells the router what they say, and gives a request to the
one that the router chooses. Streams whose replica drains, stands still or is too busy to begin
are handed over: their readers (gateway.relay) take them elsewhere.

    address comes      a link, which connects by itself; usable once it is up
    address goes       no new requests; closed when its last stream has ended
    link down          the router forgets it; its streams break
    Load: draining     no new requests; streams move when another replica is usable
    Load: frozen       the same, and its streams move at once, if only into the waiting room

Does not know text, nor how often a stream may move.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from rillgate_server.config.groups import GatewayConfig, LinkConfig
from rillgate_server.core.block_events import BlockEvent
from rillgate_server.core.clock import Clock
from rillgate_server.core.load import EngineLoad, FlushedBlocks
from rillgate_server.core.submission import Submission
from rillgate_server.core.welcome import Welcome
from rillgate_server.errors import InvalidRequest, NoReplica
from rillgate_server.gateway.addresses import AddressBook
from rillgate_server.gateway.replica_link import ReplicaLink
from rillgate_server.gateway.replica_stream import ReplicaStream
from rillgate_server.routing.rebalance import WaitingRequest, plan_moves
from rillgate_server.routing.replica_view import ReplicaView, Ticket
from rillgate_server.routing.router import Router, RouteRequest
from rillgate_server.service.tls import check_files

_log = logging.getLogger(__name__)

Refuse = Callable[[Welcome], str | None]

_NO_DOOR = LinkConfig()


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What a gateway knows of one replica, for operators."""

    address: str
    welcome: Welcome | None
    """None: it never answered."""
    load: EngineLoad | None
    """None: it is not connected."""
    is_frozen: bool
    set_aside: str
    """Why it is not used; empty: it is."""
    num_streams: int
    num_announced_blocks: int


class Fleet:
    """The replicas behind a gateway.

    State: the links by address, which addresses are still listed, the streams under way with
    their tickets, how many wait for a replica, how many moved, and two events that are
    replaced whenever they are set (a replica became usable; a load came).
    """

    def __init__(
        self, config: GatewayConfig, refuse: Refuse, clock: Clock, door: LinkConfig = _NO_DOOR
    ) -> None:
        """Follow `config.replica_addresses`; raises ConfigError for what is no address or no
        certificate.

        `refuse` may say why a replica is not one that this gateway can speak for.
        """
        check_files(door)
        self._book = AddressBook(config.replica_addresses)
        self._refuse = refuse
        self._clock = clock
        self._door = door
        self._policy = config.routing_policy
        self.failover_wait_s = config.failover_wait_s
        """How long a stream whose replica was lost waits for another one."""
        self._router = Router(config.routing_policy)
        self._links: dict[str, ReplicaLink] = {}  # address -> link
        self._listed: frozenset[str] = frozenset()
        self._tickets: dict[ReplicaStream, Ticket] = {}
        self._follower: asyncio.Task[None] | None = None
        self._became_usable = asyncio.Event()
        self._heard = asyncio.Event()
        self.num_moved_streams = 0
        """Since the start, whatever the reason."""
        self.num_waiting_streams = 0
        """For a replica, now."""

    def __repr__(self) -> str:
        return f"Fleet({list(self._links.values())}, streams={len(self._tickets)})"

    # -- life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to follow addresses and to connect, until `close`."""
        self._follower = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Disconnect for good; open streams raise NoReplica."""
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
            self._follower = None
        for link in self._links.values():
            await link.close()

    async def _follow(self) -> None:
        async for addresses in self._book.follow():
            self._listed = frozenset(addresses)
            for address in addresses:
                if address not in self._links:
                    await self._begin(address)
            for link in tuple(self._links.values()):
                await self._end_if_gone(link)

    async def _begin(self, address: str) -> None:
        link = self._links[address] = ReplicaLink(
            address,
            self._refusal,
            self,
            self._door,
            wants_blocks=self._policy == "prefix",
        )
        self._router.add(address)
        await link.start()

    async def _end_if_gone(self, link: ReplicaLink) -> None:
        """Close a link whose address is listed no more, once nothing runs there.

        Until then its streams stay: a name with many addresses may leave some out for a while.
        """
        if link.address not in self._listed and not link.streams:
            del self._links[link.address]
            self._router.remove(link.address)
            await link.close()

    def _refusal(self, welcome: Welcome) -> str | None:
        """Say why a replica is not used: another model, or the one behind another address."""
        for link in self._links.values():
            known = link.welcome
            if link.is_ready and known is not None and known.incarnation == welcome.incarnation:
                return f"it is the replica at {link.address}; list each replica once"
        return self._refuse(welcome)

    # -- what links say (LinkObserver) ------------------------------------------------------------

    def on_up(self, link: ReplicaLink) -> None:
        """Let the router use it."""
        assert link.welcome is not None
        view = self._view(link)
        view.connected(link.welcome, self._clock.now())
        if link.load is not None:
            view.heard_load(link.load, self._clock.now())
        self._became_usable = _set(self._became_usable)
        self._empty_draining()

    def on_down(self, link: ReplicaLink) -> None:
        """Let the router forget it."""
        self._view(link).disconnected()

    def on_load(self, link: ReplicaLink, load: EngineLoad) -> None:
        """Let the router know it, and move streams where that follows from it."""
        view, now = self._view(link), self._clock.now()
        was_usable = view.is_usable(now)
        view.heard_load(load, now)
        self._heard = _set(self._heard)
        if view.is_frozen and link.streams:
            _log.error(
                "the replica at %s has made no step for %.1f s; its %d streams go elsewhere",
                link.address,
                load.step_age_s,
                len(link.streams),
            )
            link.break_streams("its engine stands still")
        if view.is_usable(now) and not was_usable:
            self._became_usable = _set(self._became_usable)
        self._empty_draining()
        self._rebalance(now)

    def on_blocks(self, link: ReplicaLink, event: BlockEvent) -> bool:
        """Let the router know what is cached there."""
        view = self._view(link)
        if event.sequence == 1:
            view.watched_anew()
        return view.apply(event)

    def _view(self, link: ReplicaLink) -> ReplicaView:
        view = self._router.get(link.address)
        assert view is not None
        return view

    def _empty_draining(self) -> None:
        """Hand over what runs on draining replicas, while another one is usable."""
        if not self._can_take():
            return
        for link in self._links.values():
            if link.streams and self._view(link).is_draining:
                num_streams = link.hand_over("it is going down")
                _log.info("%d streams leave the replica at %s", num_streams, link.address)

    def _rebalance(self, now: float) -> None:
        """Let requests that wait at a loaded replica move to one that has fallen idle."""
        if len(self._links) < 2:
            return
        waiting: dict[str, list[WaitingRequest]] = {}  # address -> oldest first
        streams: dict[str, ReplicaStream] = {}  # the plan's key -> stream
        for stream, ticket in self._tickets.items():
            if not stream.is_started and not stream.is_finished:
                key = f"{stream.address} {stream.request_key}"
                streams[key] = stream
                request = WaitingRequest(key, ticket.num_choices, ticket.sent_s)
                waiting.setdefault(stream.address, []).append(request)
        for move in plan_moves(self._router.views, waiting, now):
            streams[move.request_key].hand_over("another one is idle", to=move.to_key)

    # -- requests ---------------------------------------------------------------------------------

    def submit(
        self, submission: Submission, excluded: frozenset[str] = frozenset(), wanted: str = ""
    ) -> ReplicaStream | None:
        """Hand a request to a replica; None: nobody can take it now. `release` must follow.

        `wanted`: the address to take if it can.
        """
        request = RouteRequest.of(submission)
        now = self._clock.now()
        excluded |= self._links.keys() - self._listed
        choice = None
        if wanted:
            others = frozenset(self._links) - {wanted}
            choice = self._router.choose(request, now, excluded | others)
        choice = choice or self._router.choose(request, now, excluded)
        if choice is None:
            return None
        stream = self._links[choice.key].submit(submission)
        self._tickets[stream] = self._router.sent(choice, request, now)
        return stream

    def release(self, stream: ReplicaStream) -> None:
        """Give a request up where it is, unless it is over, and count it no more."""
        stream.close()
        ticket = self._tickets.pop(stream, None)
        if ticket is not None:
            self._router.ended(ticket)

    async def wait_for_replica(self, timeout_s: float) -> None:
        """Wait until one becomes usable, at most `timeout_s`."""
        self.num_waiting_streams += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._became_usable.wait()
        finally:
            self.num_waiting_streams -= 1

    # -- operators --------------------------------------------------------------------------------

    @property
    def is_serving(self) -> bool:
        """Whether a request would find a replica."""
        return self._can_take()

    def _can_take(self) -> bool:
        now = self._clock.now()
        return any(view.is_usable(now) for view in self._router.views if view.key in self._listed)

    async def wait_ready(self, timeout_s: float | None) -> None:
        """Wait for a usable replica; raises NoReplica that says of each address why it is none."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.is_serving:
                    await self._became_usable.wait()
        except TimeoutError:
            reasons = [f"{it.address}: {it.why_not}" for it in self._links.values()]
            raise NoReplica(f"no replica at {'; '.join(reasons) or 'any address'}") from None

    def reports(self) -> list[ReplicaReport]:
        """Return what is known of each replica, in the order in which their addresses came."""
        return [
            ReplicaReport(
                address=link.address,
                welcome=link.welcome,
                load=link.load,
                is_frozen=self._view(link).is_frozen,
                set_aside=link.refusal,
                num_streams=len(link.streams),
                num_announced_blocks=self._view(link).num_blocks,
            )
            for link in self._links.values()
        ]

    async def flush_cache(self) -> tuple[int, FlushedBlocks]:
        """Let every replica forget what it cached and nobody uses; return how many were asked, and
        the sums. Raises NoReplica when one is lost before its answer, or none is there."""
        links = [link for link in self._links.values() if link.is_ready]
        if not links:
            raise NoReplica("no replica is connected now")
        flushed = await asyncio.gather(*(link.flush_cache() for link in links))
        return len(links), FlushedBlocks(
            sum(it.num_device_blocks for it in flushed), sum(it.num_host_blocks for it in flushed)
        )

    async def drain(self, replica_id: str, time_limit_s: float, *, undo: bool) -> int:
        """Take a replica out of service or back; return how many choices still run there.

        Waits at most `time_limit_s` for them. Raises InvalidRequest for an unknown name, and
        NoReplica when the replica is lost before its answer.
        """
        link = self._named(replica_id)
        await link.drain(undo=undo)
        if undo:
            return _num_choices(link.load)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(time_limit_s):
                while link.load is not None and not _is_drained(link.load):
                    await self._heard.wait()
        return _num_choices(link.load)

    def _named(self, replica_id: str) -> ReplicaLink:
        connected = [it for it in self._links.values() if it.is_ready and it.welcome is not None]
        names = [it.welcome.replica_id for it in connected if it.welcome is not None]
        if replica_id not in names:
            allowed = f"one of {', '.join(names)}" if names else "none, no replica is connected"
            raise InvalidRequest.of("replica_id", replica_id, allowed)
        return connected[names.index(replica_id)]


def _set(event: asyncio.Event) -> asyncio.Event:
    """Wake everybody who waits for an event; return the one to wait for from now on."""
    event.set()
    return asyncio.Event()


def _num_choices(load: EngineLoad | None) -> int:
    return 0 if load is None else load.num_running + load.num_loading + load.num_waiting


def _is_drained(load: EngineLoad) -> bool:
    return load.is_draining and _num_choices(load) == 0
