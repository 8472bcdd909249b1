"""`rillgate serve`: replicas and a gateway over them, as the settings say, until a signal.

Owns the directory of the sockets between them and what the operator reads. What is started is
children's and devices' to say; keeping it alive is the supervisor's.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rillgate_server.config.groups import MAX_SOCKET_PATH_BYTES
from rillgate_server.config.settings import Settings
from rillgate_server.errors import ConfigError
from rillgate_server.replica.children import (
    GATEWAY,
    gateway_group,
    replica_groups,
    socket_addresses,
)
from rillgate_server.replica.devices import CPU, Machine, Placement, assign_devices
from rillgate_server.replica.group import GroupSpec
from rillgate_server.replica.progress import shown_progress
from rillgate_server.replica.restarts import RestartPolicy
from rillgate_server.replica.supervisor import Supervisor
from rillgate_server.replica.unit import Unit


def run_serve(settings: Settings, model_dir: Path) -> int:
    """Serve the checkpoint of `model_dir` until SIGTERM, SIGINT or SIGHUP; return the exit code.

    Raises ConfigError for what cannot be started as it is configured.
    """
    if settings.serve.num_replicas == 0 and not settings.gateway.replica_addresses:
        raise ConfigError(
            "serve.num_replicas is 0 and gateway.replica_addresses is empty; allowed: a replica, "
            "or an address of one (--replica-address ADDRESS)"
        )
    settings = settings.model_copy(
        update={"model": replace(settings.model, path=str(model_dir.resolve()))}
    )
    placements = assign_devices(settings, Machine.here())
    with _socket_directory(settings) as directory:
        replicas = replica_groups(settings, placements, directory)
        _say_placements(replicas, placements)
        gateway = replace(
            settings.gateway,
            replica_addresses=(*socket_addresses(replicas), *settings.gateway.replica_addresses),
            # Made here, so that a gateway that is started again keeps it.
            cluster_secret=settings.gateway.cluster_secret or secrets.token_hex(),
        )
        policy = RestartPolicy(has_others_elsewhere=bool(settings.gateway.replica_addresses))
        group = gateway_group(settings.model_copy(update={"gateway": gateway}))
        return asyncio.run(supervise(group, replicas, policy))


async def supervise(gateway: Unit, replicas: Sequence[Unit], policy: RestartPolicy) -> int:
    """Keep them alive until a signal; say what an operator wants to know."""
    started_s = time.monotonic()

    def on_ready(texts: dict[str, str]) -> None:
        what = next((texts[unit.name] for unit in replicas if unit.name in texts), "")
        say(
            f"serving {what + ' ' if what else ''}on {texts[GATEWAY]} "
            f"(ready after {time.monotonic() - started_s:.1f} s; Ctrl-C stops)"
        )
        # A gateway that took a free port comes back on the same one.
        supervisor.pin(GATEWAY, {"RILLGATE_GATEWAY__LISTEN": texts[GATEWAY]})

    with shown_progress(sys.stderr) as show:
        supervisor = Supervisor(gateway, replicas, policy, on_ready, say, show)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # HUP: its terminal closed
            loop.add_signal_handler(number, supervisor.request_stop)
        return await supervisor.run()


def say(message: str) -> None:
    """Tell the operator."""
    print(f"rillgate: {message}", file=sys.stderr, flush=True)


def _say_placements(
    replicas: Sequence[GroupSpec], placements: Sequence[Sequence[Placement]]
) -> None:
    """Say who computes where, unless there is but one place for one process."""
    if len(placements) == 1 and [it.device for it in placements[0]] == [CPU]:
        return
    for group, ranks in zip(replicas, placements, strict=True):
        say(f"{group.name}: {', '.join(map(str, ranks))}")


@contextlib.contextmanager
def _socket_directory(settings: Settings) -> Iterator[Path]:
    """Yield a directory for this user alone, whose name leaves room for a socket's."""
    if settings.replica.socket or settings.serve.num_replicas == 0:
        yield Path(settings.replica.socket).parent  # nothing is to be made
        return
    try:
        made = tempfile.TemporaryDirectory(prefix="rillgate-")  # mode 0700
    except OSError as error:
        raise ConfigError(
            f"no directory for the replicas' sockets can be made: {error.strerror}; allowed: "
            f"TMPDIR, such a directory (or replica.socket, a path that can be written, for one)"
        ) from error
    with made as directory:
        path = Path(directory) / "replica-255.sock"
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(
                f"TMPDIR makes a socket's path of {len(os.fsencode(path))} bytes; allowed: "
                f"{MAX_SOCKET_PATH_BYTES}"
            )
        yield Path(directory)
