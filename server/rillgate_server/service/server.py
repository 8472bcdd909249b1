"""Builds gRPC servers: limits, keepalive, health, reflection and channelz, the same everywhere.

Owns the options of a public server and their reasons. Knows no service of ours: whoever builds one
adds its servicers. Keepalive: https://grpc.io/docs/guides/keepalive/
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grpc
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from rillgate_server.config.groups import GatewayConfig
from rillgate_server.errors import ConfigError

MAX_METADATA_BYTES = 16 << 10
"""Of a call's headers; gRPC's own default is 8 KiB soft, 16 KiB hard."""
MIN_CALLER_PING_INTERVAL_S = 1.0
"""A caller may ping this often, calls open or not; gRPC's default of 300 s cuts callers off that
want to notice a lost server within seconds."""


def public_server(
    config: GatewayConfig, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()
) -> grpc.aio.Server:
    """Build a server with the public limits; the caller adds services, binds and starts it."""
    return grpc.aio.server(interceptors=interceptors, options=_options(config))


def _options(config: GatewayConfig) -> list[tuple[str, int]]:
    return [
        # gRPC's default lets a second server on the port take half the calls in silence.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        # An answer is longer than its request allows for (log-probabilities); ours to bound, not
        # a reason to fail a finished generation.
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        # A caller that vanished without a word is noticed after keepalive_s + keepalive_timeout_s.
        ("grpc.keepalive_time_ms", round(config.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(config.keepalive_timeout_s * 1000)),
        # A ping's own timeout is another setting, 60 s unless said otherwise, and while a ping is
        # under way it is the one that counts (seen with grpcio 1.85 behind a silent proxy).
        ("grpc.http2.ping_timeout_ms", round(config.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        # 0 = any number: without it, gRPC stops pinging while it sends no data, as before the
        # first token of a long prompt.
        ("grpc.http2.max_pings_without_data", 0),
        (
            "grpc.http2.min_ping_interval_without_data_ms",
            round(MIN_CALLER_PING_INTERVAL_S * 1000),
        ),
    ]


def bind(server: grpc.aio.Server, listen: str) -> int:
    """Listen on HOST:PORT and return the port; raises ConfigError when it cannot be had."""
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise ConfigError(
            f"gateway.listen is {listen!r}, which cannot be had: the port is in use, or the "
            f"address is not this machine's; allowed: a free HOST:PORT"
        ) from error
    if port == 0:
        raise ConfigError(f"gateway.listen is {listen!r}, which cannot be had")
    return port


@dataclass(frozen=True, slots=True)
class HealthBoard:
    """grpc.health.v1 for a set of service names that are up or down together."""

    servicer: health.aio.HealthServicer
    names: tuple[str, ...]
    """The empty name is the whole server's."""

    @classmethod
    def add_to(cls, server: grpc.aio.Server, names: Iterable[str]) -> "HealthBoard":
        """Add the health service to `server`; `set_serving` must follow."""
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        return cls(servicer, ("", *names))

    async def set_serving(self, is_serving: bool) -> None:
        """Say of every name whether it serves; watchers hear of changes."""
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if is_serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in self.names:
            await self.servicer.set(name, status)

    async def drain(self) -> None:
        """Say NOT_SERVING for good: later `set_serving` changes nothing."""
        await self.servicer.enter_graceful_shutdown()


def add_introspection(server: grpc.aio.Server, service_names: Iterable[str]) -> None:
    """Add reflection over `service_names`, and channelz."""
    channelz.add_channelz_servicer(server)
    reflection.enable_server_reflection(
        (
            *service_names,
            health.SERVICE_NAME,
            reflection.SERVICE_NAME,
            "grpc.channelz.v1.Channelz",
        ),
        server,
    )
