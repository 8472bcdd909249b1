"""`rillgate serve --cluster ray`: replicas wherever Ray finds room, a gateway here.

Owns the connection to Ray and what replicas are asked to be there. This process is Ray's driver:
when it ends, however it does, Ray ends the actors, and with them everything that they started.
Imported only when chosen, because of Ray.
"""

import asyncio
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ray

from rillgate_server.config.groups import LinkConfig
from rillgate_server.config.settings import Settings
from rillgate_server.errors import ConfigError
from rillgate_server.replica.address_file import AddressFile
from rillgate_server.replica.children import gateway_group, rank_children, replica_name
from rillgate_server.replica.devices import AUTO, CPU, Placement
from rillgate_server.replica.ray_replica import RayPlan, RayReplica
from rillgate_server.replica.restarts import RestartPolicy
from rillgate_server.replica.serve import say, supervise

_CONNECT_S = 10.0
"""To the head; Ray itself would try for minutes."""


def run_serve(settings: Settings, model_dir: Path) -> int:
    """Serve the checkpoint of `model_dir`, which lies at the same path on every machine.

    Until SIGTERM, SIGINT or SIGHUP; returns the exit code. Raises ConfigError.
    """
    _refuse(settings)
    settings = settings.model_copy(
        update={
            "model": replace(settings.model, path=str(model_dir.resolve())),
            "link": _with_a_token(settings.link),
        }
    )
    with (
        _connected(settings.serve.ray_address),
        tempfile.TemporaryDirectory(
            prefix="rillgate-"  # mode 0700
        ) as directory,
    ):
        addresses = AddressFile(Path(directory) / "replicas")
        has_gpus = "GPU" in ray.cluster_resources()
        replicas = [RayReplica(plan, addresses, say) for plan in ray_plans(settings, has_gpus)]
        gateway = replace(
            settings.gateway,
            replica_addresses=(addresses.source, *settings.gateway.replica_addresses),
            cluster_secret=settings.gateway.cluster_secret or secrets.token_hex(),
        )
        policy = RestartPolicy(has_others_elsewhere=bool(settings.gateway.replica_addresses))
        group = gateway_group(settings.model_copy(update={"gateway": gateway}))
        return asyncio.run(supervise(group, replicas, policy))


def ray_plans(settings: Settings, has_gpus: bool) -> Iterator[RayPlan]:
    """Say for each replica what its ranks are, and what each needs: a core per thread, or a GPU."""
    num_threads = settings.replica.num_threads or 1
    has_gpus = has_gpus and settings.serve.devices == AUTO
    bundle = {"CPU": float(num_threads), **({"GPU": 1.0} if has_gpus else {})}
    placement = Placement(
        "cuda:0" if has_gpus else CPU,
        None if has_gpus else "",  # Ray says which GPU
        num_threads,
        settings.replica.max_memory_bytes,
    )
    for index in range(settings.serve.num_replicas):
        named = replace(settings.replica, name=replica_name(settings, index), socket="")
        ranks = rank_children(
            settings.model_copy(update={"replica": named}),
            [placement] * settings.replica.tensor_parallel_size,
        )
        yield RayPlan(
            named.name,
            ranks,
            bundle,
            settings.serve.ray_lease_s,
            settings.replica.max_memory_bytes,
        )


def _refuse(settings: Settings) -> None:
    """Raise ConfigError for what Ray decides, or what cannot be."""
    if settings.serve.num_replicas == 0:
        raise ConfigError("serve.num_replicas is 0 with serve.cluster = ray; allowed: 1 to 256")
    if settings.serve.devices not in (AUTO, CPU):
        raise ConfigError(
            f"serve.devices is {settings.serve.devices[:200]!r} with serve.cluster = ray, which "
            f"assigns devices itself; allowed: {AUTO}, {CPU}"
        )
    for field in ("socket", "listen"):
        value = getattr(settings.replica, field)
        if value:
            raise ConfigError(
                f"replica.{field} is {value!r} with serve.cluster = ray, where each replica "
                f"listens at a free port of its machine; allowed: none"
            )


def _with_a_token(link: LinkConfig) -> LinkConfig:
    """Return the link's settings; where they close no door, with a token for both ends."""
    if link.has_tls or link.token or link.insecure:
        return link
    return replace(link, token=secrets.token_hex())


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Join the cluster as a driver; raises ConfigError when there is none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # where this starts the cluster
    if "://" in address:
        raise _no_cluster(address, "a client's address")
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
        except (OSError, OverflowError) as error:
            raise _no_cluster(address, str(error)) from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, " ".join(str(error).split())[:300]) from error
    try:
        yield
    finally:
        ray.shutdown()


def _no_cluster(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"serve.ray_address is {address[:200]!r}, and no Ray cluster was found there ({why}); "
        f"allowed: auto, local or HOST:PORT of a cluster that this machine is part of (`ray start`)"
    )
