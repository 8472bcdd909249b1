"""Who may use the door between gateways and replicas, from both of its sides.

On a Unix socket the file's mode decides. Over TCP a certificate does (service.tls), or a token that
both ends know, or nobody, where the operator said so. Owns the token's check and how a gateway
connects; does not know what is said through the door.
"""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from rillgate_server.config.groups import LinkConfig
from rillgate_server.service.tls import channel_credentials

AUTHORIZATION = "authorization"
_UNIX = "unix:"

Metadata = tuple[tuple[str, str], ...]
Options = tuple[tuple[str, str | int], ...]
# Any: grpc's handlers are generic in the messages of a method.
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Next: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]"

KEEPALIVE_OPTIONS: Options = (
    # A host that vanished sends no FIN: without pings its requests would run to their end.
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
)
"""Of both ends, over TCP."""


def link_channel(address: str, config: LinkConfig, options: Options) -> grpc.aio.Channel:
    """Connect to a replica as `config` says; a Unix socket needs neither certificate nor token."""
    if address.startswith(_UNIX):
        return grpc.aio.insecure_channel(address, options=options)
    options = (*options, *KEEPALIVE_OPTIONS)
    if not config.has_tls:
        return grpc.aio.insecure_channel(address, options=options)
    if config.tls_server_name:
        options = (*options, ("grpc.ssl_target_name_override", config.tls_server_name))
    return grpc.aio.secure_channel(address, channel_credentials(config), options=options)


def link_metadata(address: str, config: LinkConfig) -> Metadata:
    """Return what every call to a replica carries."""
    if address.startswith(_UNIX) or not config.token:
        return ()
    return ((AUTHORIZATION, _bearer(config.token)),)


class TokenCheck(grpc.aio.ServerInterceptor):
    """Lets nobody in without the token."""

    def __init__(self, token: str) -> None:
        """Take the token, which is not empty."""
        self._expected = _bearer(token).encode()

    def __repr__(self) -> str:
        return "TokenCheck()"  # never the token

    async def intercept_service(
        self, continuation: _Next, handler_call_details: grpc.HandlerCallDetails
    ) -> "_Handler | None":
        """Give a call to its handler, or to one that answers UNAUTHENTICATED."""
        handler = await continuation(handler_call_details)
        given = dict(handler_call_details.invocation_metadata).get(AUTHORIZATION, "")
        given_bytes = given if isinstance(given, bytes) else given.encode()
        if handler is None or hmac.compare_digest(given_bytes, self._expected):
            return handler
        return _refusing(handler)


def _bearer(token: str) -> str:
    return f"Bearer {token}"


def _refusing(handler: "_Handler") -> "_Handler":
    """Return a handler of the same kind that refuses."""

    async def refuse(request: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(
            grpc.StatusCode.UNAUTHENTICATED,
            "this replica wants a token that this gateway does not have; set the same link.token "
            "on both sides",
        )

    # Any: which of four functions it is depends on the handler.
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[(handler.request_streaming, handler.response_streaming)]
    refusing: _Handler = make(
        refuse,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return refusing
