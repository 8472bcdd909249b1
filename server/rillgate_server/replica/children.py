"""What `rillgate serve` starts: settings and places to the commands and environments of children.

Owns names, addresses and what each child is told (by its environment: settings hold secrets, which
a command line shows to everybody). Starts nothing.
"""

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rillgate_server.config.settings import Settings
from rillgate_server.errors import ConfigError
from rillgate_server.replica.child import ChildSpec
from rillgate_server.replica.devices import VISIBLE_DEVICES, Placement
from rillgate_server.replica.group import GroupSpec

GATEWAY = "gateway"
REPLICA = "replica"

_COMMAND = (sys.executable, "-m", "rillgate_server.cli")
_STOP_MARGIN_S = 10.0  # a child's own end after its grace: closing sockets, freeing memory


def replica_groups(
    settings: Settings, placements: Sequence[Sequence[Placement]], directory: Path
) -> list[GroupSpec]:
    """Describe each replica: its ranks, which meet at a fresh port and serve at a socket."""
    _refuse_one_door_for_many(settings)
    groups = []
    for index, ranks in enumerate(placements):
        path = settings.replica.socket or str(directory / f"{REPLICA}-{index}.sock")
        named = replace(settings.replica, name=replica_name(settings, index), socket=path)
        children = rank_children(settings.model_copy(update={"replica": named}), ranks)
        fresh = fresh_rendezvous if len(ranks) > 1 else dict
        groups.append(GroupSpec(named.name, children, fresh))
    return groups


def replica_name(settings: Settings, index: int) -> str:
    """Return what status and logs call a replica."""
    return f"{settings.replica.name or REPLICA}-{index}"


def rank_children(settings: Settings, placements: Sequence[Placement]) -> tuple[ChildSpec, ...]:
    """Describe the processes of the replica that `settings` are for."""
    return tuple(_rank(settings, rank, placement) for rank, placement in enumerate(placements))


def socket_addresses(replicas: Sequence[GroupSpec]) -> tuple[str, ...]:
    """Return where a gateway finds these replicas."""
    return tuple(
        f"unix:{Path(group.children[0].environment['RILLGATE_REPLICA__SOCKET']).resolve()}"
        for group in replicas
    )


def gateway_group(settings: Settings) -> GroupSpec:
    """Describe the gateway over gateway.replica_addresses."""
    child = ChildSpec(
        GATEWAY,
        (*_COMMAND, GATEWAY),
        _environment(settings),
        settings.gateway.drain_grace_s + _STOP_MARGIN_S,
    )
    return GroupSpec(GATEWAY, (child,))


def _rank(settings: Settings, rank: int, placement: Placement) -> ChildSpec:
    """Describe one process of a replica."""
    num_ranks = settings.replica.tensor_parallel_size
    name = settings.replica.name
    own = replace(
        settings.replica,
        rank=rank,
        num_threads=placement.num_threads,
        max_memory_bytes=placement.max_memory_bytes,
    )
    return ChildSpec(
        name if num_ranks == 1 else f"{name} rank {rank}",
        (*_COMMAND, REPLICA),
        {
            **_environment(settings.model_copy(update={"replica": own})),
            "RILLGATE_GATEWAY__CLUSTER_SECRET": "",  # gets salts, never the secret
            **_visible_devices(placement),
        },
        settings.replica.drain_grace_s + _STOP_MARGIN_S,
    )


def _visible_devices(placement: Placement) -> dict[str, str]:
    named = placement.visible_devices
    return {} if named is None else {VISIBLE_DEVICES: named}


def _environment(settings: Settings) -> dict[str, str]:
    return {
        # gRPC's C core writes lines of its own beside the errors that it also raises.
        "GRPC_VERBOSITY": os.environ.get("GRPC_VERBOSITY", "NONE"),
        **settings.to_environment(),
    }


def fresh_rendezvous() -> dict[str, str]:
    """Return the variable that names a port which is free now: one of an earlier start could still
    be waited on there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"RILLGATE_REPLICA__RENDEZVOUS": f"127.0.0.1:{probe.getsockname()[1]}"}


def _refuse_one_door_for_many(settings: Settings) -> None:
    """Raise ConfigError where several replicas would listen at one place."""
    if settings.serve.num_replicas < 2:
        return
    if settings.replica.socket:
        raise ConfigError(
            f"replica.socket is {settings.replica.socket!r} for {settings.serve.num_replicas} "
            f"replicas; allowed: none, which gives each its own"
        )
    if settings.replica.listen and not settings.replica.listen.endswith(":0"):
        raise ConfigError(
            f"replica.listen is {settings.replica.listen!r} for {settings.serve.num_replicas} "
            f"replicas; allowed: port 0, which gives each its own"
        )
