"""The border of every public call: its id, its errors, its line in the access log.

Owns the translation of exceptions to status (by the table of status_codes), and the reading of
request bytes, so that bytes which are no message are the caller's error and not a bug of ours.
Does not know what any service does.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2
from grpc_status import rpc_status

from rillgate_server.errors import InvalidRequest
from rillgate_server.service.call_context import REQUEST_ID_KEY, CallContext
from rillgate_server.service.log_events import LogValue, log_event
from rillgate_server.service.status_codes import is_callers_business, status_of
from rillgate_server.service.wire_faults import wire_fault

_access_log = logging.getLogger("rillgate.access")
_log = logging.getLogger("rillgate.error")

# Any: one interceptor serves methods of all request and response types.
_Context = grpc.aio.ServicerContext[Any, Any]
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in the stubs alone
_Behaviour = Callable[[Any, _Context], Awaitable[Any]]


class _Undecodable:
    """Stands in for a request whose bytes are no message; says what is wrong with which field."""

    def __init__(self, field: str, fault: str) -> None:
        self.field = field
        self.fault = fault


class CallBorder(grpc.aio.ServerInterceptor):
    """Wraps the methods of the services named; others (health, reflection) pass untouched.

    Methods must be coroutines: unary ones return the response, streaming ones call context.write.
    """

    def __init__(self, service_names: tuple[str, ...]) -> None:
        """Guard these services."""
        self._prefixes = tuple(f"/{name}/" for name in service_names)

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler with the border around it."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(self._prefixes):
            return handler
        # Any: the stubs know the handlers of synchronous servers alone.
        behaviour: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        assert behaviour, f"{method} streams its requests"
        assert handler.request_deserializer, f"{method} takes raw bytes"
        make: Any = (
            grpc.unary_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make(
            _guarded(method, behaviour),
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


def _tolerant(deserialize: Callable[[bytes], Message]) -> Callable[[bytes], Message | _Undecodable]:
    """Return bytes that are no message as a value: gRPC would answer INTERNAL to an exception."""

    # The generated code registers `Message.FromString`.
    # Any: the stubs know neither that nor upb's descriptors.
    message_class: Any = cast("Any", deserialize).__self__

    def deserialize_or_mark(data: bytes) -> Message | _Undecodable:
        try:
            return deserialize(data)
        except (DecodeError, ValueError):
            return _Undecodable(*wire_fault(data, message_class.DESCRIPTOR))

    return deserialize_or_mark


def _guarded(method: str, behaviour: _Behaviour) -> _Behaviour:
    """Wrap one method."""

    async def serve(request: Message | _Undecodable, context: _Context) -> Any:
        call = CallContext.open(context.invocation_metadata() or ())
        context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
        began_s = time.monotonic()
        outcome = "OK"
        try:
            if isinstance(request, _Undecodable):
                raise InvalidRequest.of(
                    request.field,
                    request.fault,
                    "the bytes of one protobuf message, valid UTF-8 in its strings",
                )
            return await behaviour(request, context)
        except asyncio.CancelledError:
            outcome = "CANCELLED"
            raise
        except Exception as error:  # the border of the servicer
            if not is_callers_business(error):
                _log.error("request %s failed in %s", call.request_id, method, exc_info=error)
            status = status_of(error, call.request_id)
            outcome = _code_name(status)
            await _abort(context, status, call.request_id)
        finally:
            fields: dict[str, LogValue] = {
                "method": method,
                "request_id": call.request_id,
                "status": outcome,
                "seconds": round(time.monotonic() - began_s, 6),
                "peer": context.peer(),
            }
            log_event(_access_log, "call", fields | call.log_fields)

    return serve


async def _abort(context: _Context, status: status_pb2.Status, request_id: str) -> None:
    """End the call with a status and its details."""
    rich = rpc_status.to_status(status)
    trailers = (*(rich.trailing_metadata or ()), (REQUEST_ID_KEY, request_id))
    await context.abort(rich.code, rich.details or "", trailers)


def _code_name(status: status_pb2.Status) -> str:
    return next(code.name for code in grpc.StatusCode if code.value[0] == status.code)
