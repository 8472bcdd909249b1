"""How the ranks of a split model find each other, and that they agree on what they will do.

Over torch's own TCPStore at HOST:PORT, hosted by rank 0, or by torchrun's agent where there is one.
Rank 0 writes where it listens and a random key, so that nobody joins who was not at the store; each
other rank connects twice, for plans and for heartbeats, and says what it is going to load. Does not
know what comes after: worker.rank_group does.

The store and the collectives have no authentication: the ranks' network must be a private one.
"""

import json
import logging
import secrets
import socket
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed's, typed

from rillgate_server.errors import ConfigError, RankLost
from rillgate_server.worker.rank_link import RankLink

JOIN_S = 300.0
"""For all ranks to come; the same as torchrun's, since machines start at different times."""
_HELLO_S = 5.0
"""For somebody who connected to say who it is."""
_MAX_HELLO_BYTES = 1 << 16
_CONTROL = "control"
_PLANS, _BEATS = "plans", "beats"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_log = logging.getLogger(__name__)

Facts = Mapping[str, str]
"""What all ranks must agree on -> this rank's."""


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Which rank of how many, and where they meet."""

    rank: int
    ranks: int
    host: str
    port: int
    agent_attempt: str = ""
    """Not empty: torchrun's agent hosts the store, and keeps it over restarts; which start this
    is."""

    @property
    def address(self) -> str:
        """For messages."""
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Meeting:
    """What a rank has once all have come and agree."""

    store: Store
    links: dict[int, RankLink]
    """rank -> connection for plans: on rank 0 to all others, elsewhere to rank 0."""
    beats: dict[int, socket.socket]
    """The same for heartbeats."""
    own_address: str
    num_local: int
    """Ranks on this machine, this one included."""


def meet(place: RankPlace, facts: Facts, device: str = "", join_s: float = JOIN_S) -> Meeting:
    """Wait for all ranks. Raises ConfigError: nobody came, the place cannot be had, or ranks
    disagree, which names what on which rank.

    `device` names the one that this rank has for itself; empty: none.
    """
    own_address = _own_address(place)
    store = _open_store(place, join_s)
    if place.rank == 0:
        host = _Host(place, facts, device, own_address, store)
        return host.receive_all(time.monotonic() + join_s)
    return _join(place, facts, device, own_address, store)


class _Host:
    """Rank 0, waiting for the others. State: who has come."""

    def __init__(
        self, place: RankPlace, facts: Facts, device: str, own_address: str, store: Store
    ) -> None:
        self._place = place
        self._facts = facts
        self._own_address = own_address
        self._store = store
        self._links: dict[int, RankLink] = {}
        self._beats: dict[int, socket.socket] = {}
        self._machines: dict[int, str] = {0: _machine()}
        self._devices: dict[str, int] = {device: 0}  # device -> the rank that has it
        self._key = secrets.token_hex(16)

    def receive_all(self, deadline_s: float) -> Meeting:
        """Wait for all; whoever has come hears how it ends."""
        try:
            self._receive_until(deadline_s)
        except ConfigError as error:
            for link in self._links.values():
                refuse(link, str(error))
            for connection in self._beats.values():
                connection.close()
            raise
        counts = Counter(self._machines.values())
        for rank, link in self._links.items():
            link.send(json.dumps({"num_local": counts[self._machines[rank]]}).encode())
        num_local = counts[self._machines[0]]
        return Meeting(self._store, self._links, self._beats, self._own_address, num_local)

    def _receive_until(self, deadline_s: float) -> None:
        family = socket.AF_INET6 if ":" in self._own_address else socket.AF_INET
        with socket.create_server((self._own_address, 0), family=family) as door:
            control = {"address": self._own_address, "port": door.getsockname()[1]}
            self._store.set(_CONTROL, json.dumps(control | {"key": self._key}))
            while len(self._links) + len(self._beats) < 2 * (self._place.ranks - 1):
                door.settimeout(max(0.01, deadline_s - time.monotonic()))
                try:
                    connection, _ = door.accept()
                except TimeoutError:
                    raise self._missing() from None
                self._receive(connection)

    def _receive(self, connection: socket.socket) -> None:
        """Take in who connected, or close on a stranger."""
        link = RankLink(connection, "a rank that joins")
        try:
            hello = json.loads(link.receive(_HELLO_S, _MAX_HELLO_BYTES))
            is_known = secrets.compare_digest(str(hello["key"]), self._key)
            rank, channel = int(hello["rank"]), hello["channel"]
            facts, machine, device = hello["facts"], hello["machine"], hello["device"]
        except (RankLost, ValueError, KeyError, TypeError) as error:
            _log.warning("somebody connected who is no rank: %s", error)
            link.close()
            return
        if not is_known or not 0 < rank < self._place.ranks:
            link.close()
        elif channel == _BEATS and rank not in self._beats:
            self._beats[rank] = connection
        elif rank in self._links:
            refuse(
                link,
                f"rank {rank} has come to {self._place.address} already; start each rank once",
            )
        else:
            link.name = f"rank {rank}"
            self._links[rank], self._machines[rank] = link, machine
            self._check(rank, facts)
            self._check_device(rank, device)
            link.send(json.dumps({}).encode())  # it comes a second time, for heartbeats

    def _check(self, rank: int, facts: dict[str, str]) -> None:
        """Raise ConfigError for a rank that was told something else than this one."""
        for name, own in self._facts.items():
            if facts.get(name) != own:
                raise ConfigError(
                    f"rank {rank} (on {self._machines[rank]}) has {name} {facts.get(name)!r}, "
                    f"rank 0 (on {self._machines[0]}) has {own!r}; start all ranks with the same "
                    "model and settings"
                )

    def _check_device(self, rank: int, device: str) -> None:
        """Raise ConfigError for a rank whose device another one has."""
        if device and device in self._devices:
            raise ConfigError(
                f"rank {rank} and rank {self._devices[device]} (on {self._machines[rank]}) have "
                f"the same CUDA device, {device}; allowed: at most one rank per device "
                "(CUDA_VISIBLE_DEVICES says which a process sees)"
            )
        self._devices[device] = rank

    def _missing(self) -> ConfigError:
        missing = [str(r) for r in range(1, self._place.ranks) if r not in self._links]
        return ConfigError(
            f"replica.rendezvous is {self._place.address!r}, where rank {', '.join(missing)} of "
            f"{self._place.ranks} did not come in time; start each with `rillgate replica --rank R "
            f"--ranks {self._place.ranks} --rendezvous {self._place.address}`"
        )


def _join(place: RankPlace, facts: Facts, device: str, own_address: str, store: Store) -> Meeting:
    """Come to rank 0, as another rank: once for plans and, when it agrees, for heartbeats."""
    opened: list[RankLink] = []
    try:
        control = json.loads(store.get(_CONTROL))
        hello = {"key": control["key"], "rank": place.rank, "device": device}
        hello |= {"machine": _machine()}
        for channel in (_PLANS, _BEATS):
            connection = socket.create_connection((control["address"], control["port"]), _HELLO_S)
            opened.append(RankLink(connection, "rank 0"))
            opened[-1].send(json.dumps(hello | {"facts": dict(facts), "channel": channel}).encode())
            answer = json.loads(opened[0].receive(max_bytes=_MAX_HELLO_BYTES))
            if "refused" in answer:
                raise ConfigError(answer["refused"])
    except BaseException as error:
        for link in opened:
            link.close()
        if isinstance(error, (RuntimeError, OSError)):
            raise ConfigError(
                f"replica.rendezvous is {place.address!r}, but rank 0 is not to be had there: "
                f"{error}"
            ) from error
        raise
    plans, beats = opened
    return Meeting(store, {0: plans}, {0: beats.detach()}, own_address, answer["num_local"])


def refuse(link: RankLink, reason: str) -> None:
    """Tell another rank why the group does not come to be, and close."""
    try:
        link.send(json.dumps({"refused": reason}).encode())
    except RankLost as error:
        _log.warning("%s does not hear that it is refused: %s", link.name, error)
    link.close()


def _open_store(place: RankPlace, join_s: float) -> Store:
    """Host the store, or find it; raises ConfigError."""
    is_host = place.rank == 0 and not place.agent_attempt
    timeout = timedelta(seconds=join_s)
    try:
        descriptor = _listen(place).detach() if is_host else None
        store = TCPStore(
            place.host,
            place.port,
            place.ranks,
            is_host,
            timeout,
            wait_for_workers=False,
            master_listen_fd=descriptor,
        )
        return PrefixStore(f"rillgate/{place.agent_attempt}", store)
    except (RuntimeError, OSError) as error:
        what = "be bound" if is_host else "be reached"
        raise ConfigError(
            f"replica.rendezvous is {place.address!r}, which cannot {what}: "
            f"{str(error).splitlines()[0]}; allowed: HOST:PORT, free on rank 0's machine"
        ) from error


def _listen(place: RankPlace) -> socket.socket:
    """Listen at the rendezvous alone; torch's own way would listen on every interface."""
    *_, (family, _, _, _, where) = socket.getaddrinfo(
        place.host, place.port, type=socket.SOCK_STREAM
    )
    return socket.create_server(where[:2], family=family, backlog=2 * place.ranks + 16)


def _own_address(place: RankPlace) -> str:
    """Return this machine's address as the rendezvous sees it; sends nothing."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(
            place.host, place.port, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"replica.rendezvous is {place.address!r}, to which no way leads: {error}"
        ) from error


def _machine() -> str:
    """Name this machine; two containers are two, since each has limits of its own."""
    try:
        boot_id = _BOOT_ID.read_text().strip()
    except OSError:
        boot_id = ""
    return f"{socket.gethostname()} {boot_id}".strip()
