"""From a target and a ClientConfig to what a gRPC channel is made of.

Owns target syntax, channel options and credentials. Knows nothing of calls, and does not make the
channel: the two clients have different ones.
"""

import ipaddress
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from rillgate.config import ClientConfig

Options = tuple[tuple[str, str | int], ...]


@dataclass(frozen=True, slots=True)
class ChannelPlan:
    """The arguments of grpc.secure_channel, or of insecure_channel without credentials."""

    target: str
    credentials: grpc.ChannelCredentials | None
    options: Options


def plan_channel(target: str | Sequence[str], config: ClientConfig) -> ChannelPlan:
    """Decide target, credentials and options.

    A text goes to gRPC as it is: `host:port`, `dns:///name:port` (all addresses of the name),
    `unix:///path`. Several `host:port` become one target; names among them are resolved now, once.
    """
    one_target = target if isinstance(target, str) else _join(target)
    return ChannelPlan(one_target, _credentials(config), _options(config))


def _join(targets: Sequence[str]) -> str:
    if not targets:
        raise ValueError("targets is empty; allowed: at least one address")
    if len(targets) == 1:
        return targets[0]
    addresses = list(dict.fromkeys(a for target in targets for a in _resolve(target)))
    # A channel takes one family; names such as `localhost` often have both.
    for family in ("ipv4", "ipv6"):
        of_family = [text for name, text in addresses if name == family]
        if of_family:
            return f"{family}:{','.join(of_family)}"
    raise ValueError(f"no address found for {', '.join(targets)}")


def _resolve(target: str) -> list[tuple[str, str]]:
    """List (`ipv4` or `ipv6`, address with port) of one `host:port`."""
    host, colon, port = target.rpartition(":")
    if not colon or not port.isdigit():
        raise ValueError(f"{target!r} is not an address; allowed: HOST:PORT")
    host = host.removeprefix("[").removesuffix("]")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"{host!r} cannot be resolved: {error}") from error
    addresses = []
    for *_, address in found:
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        name, text = ("ipv4", str(ip)) if ip.version == 4 else ("ipv6", f"[{ip}]")
        addresses.append((name, f"{text}:{port}"))
    return addresses


def _credentials(config: ClientConfig) -> grpc.ChannelCredentials | None:
    if config.tls is None:
        return None
    return grpc.ssl_channel_credentials(
        config.tls.root_certificates, config.tls.private_key, config.tls.certificate_chain
    )


def _options(config: ClientConfig) -> Options:
    options: Options = (
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.keepalive_time_ms", round(config.keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(config.keepalive_timeout_s * 1000)),
        # A ping has a timeout of its own, 60 s unless said otherwise, which would count instead;
        # and without "any number" (0) gRPC stops pinging a server that is slow to answer.
        ("grpc.http2.ping_timeout_ms", round(config.keepalive_timeout_s * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        # A connection that was lost is tried again every second, not after gRPC's two minutes, so
        # that a restarted server is found at once. The one called `min` is how long an attempt may
        # take: with 200 ms a far or a busy server was never reached at first.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.service_config", json.dumps({"loadBalancingConfig": [{config.balancing: {}}]})),
    )
    if config.tls is not None and config.tls.server_name is not None:
        options += (("grpc.ssl_target_name_override", config.tls.server_name),)
    return options
