"""The one table from Rillgate's errors to gRPC status with google.rpc details (design, section 5).

Owns what a caller sees of an error. An error that is no caller's business (a bug of ours, an
operator's mistake) becomes INTERNAL with the request id alone: its text is for the log. Does not
know calls or interceptors.
"""

from collections.abc import Callable
from typing import TypeVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from rillgate_server.errors import (
    ContinuationMismatch,
    DeadlineExceeded,
    DeadlineUnattainable,
    Draining,
    InvalidRequest,
    ModelNotFound,
    NoReplica,
    Overloaded,
    RillgateError,
    StreamLost,
    VersionGone,
)

DOMAIN = "rillgate"
"""Of every ErrorInfo."""
MAX_STATUS_BYTES = 4096
"""Of a serialised status: trailers have a limit of 8 KiB, and base64 adds a third. The message
stands in them once more, percent-encoded: three bytes for each that is not ASCII."""
_MAX_MESSAGE_BYTES = 400
_MAX_FIELD_BYTES = 200

_RETRY_REASONS: dict[type[RillgateError], str] = {
    Overloaded: "OVERLOADED",
    NoReplica: "NO_REPLICA",
    StreamLost: "STREAM_LOST",
}

_Error = TypeVar("_Error", bound=RillgateError)
_Details = tuple[Message, ...]


def status_of(error: BaseException, request_id: str) -> status_pb2.Status:
    """Return the status that a caller gets for `error`; at most MAX_STATUS_BYTES."""
    for error_class, (code, details_of) in _TABLE.items():
        if isinstance(error, error_class):
            return _build(code, str(error), (*details_of(error), _request_info(request_id)))
    info = error_details_pb2.ErrorInfo(
        reason="INTERNAL", domain=DOMAIN, metadata={"request_id": request_id}
    )
    message = f"internal error; its cause is in the server's log under request {request_id}"
    return _build(grpc.StatusCode.INTERNAL, message, (info, _request_info(request_id)))


def is_callers_business(error: BaseException) -> bool:
    """Tell whether the caller sees what `error` says."""
    return isinstance(error, tuple(_TABLE))


def _build(code: grpc.StatusCode, message: str, details: _Details) -> status_pb2.Status:
    """Pack details in order, the last ones left out when they would make it too big."""
    status = status_pb2.Status(code=code.value[0], message=_cut(message, _MAX_MESSAGE_BYTES))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        if status.ByteSize() + packed.ByteSize() + 8 <= MAX_STATUS_BYTES:
            status.details.append(packed)
    return status


# -- details --------------------------------------------------------------------------------------


def _bad_request(error: InvalidRequest) -> _Details:
    details = error_details_pb2.BadRequest()
    for violation in error.violations:
        entry = error_details_pb2.BadRequest.FieldViolation(
            field=_cut(violation.field, _MAX_FIELD_BYTES),
            description=_cut(
                f"is {violation.value}; allowed: {violation.allowed}", 2 * _MAX_FIELD_BYTES
            ),
        )
        if details.ByteSize() + entry.ByteSize() > MAX_STATUS_BYTES // 2:
            break
        details.field_violations.append(entry)
    return (details,)


def _model_resource(error: ModelNotFound) -> _Details:
    return (_resource("rillgate.v1.Model", error.model, str(error)),)


def _version_resource(error: VersionGone) -> _Details:
    return (_resource("rillgate.v1.ModelVersion", error.asked, str(error)),)


def _precondition(error: ContinuationMismatch) -> _Details:
    violation = error_details_pb2.PreconditionFailure.Violation(
        type="CONTINUATION_MISMATCH",
        subject=f"continuation.{error.field}",
        description=_cut(str(error), _MAX_MESSAGE_BYTES),
    )
    return (error_details_pb2.PreconditionFailure(violations=[violation]),)


def _retry(error: Overloaded | NoReplica | Draining) -> _Details:
    delay = Duration()
    delay.FromMilliseconds(max(0, round(error.retry_after_s * 1000)))
    reason = _RETRY_REASONS.get(type(error), "DRAINING")
    metadata = error.continuation if isinstance(error, StreamLost) else {}
    return (
        error_details_pb2.RetryInfo(retry_delay=delay),
        error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata),
    )


def _deadline(error: DeadlineExceeded) -> _Details:
    return (error_details_pb2.ErrorInfo(reason="DEADLINE_EXCEEDED", domain=DOMAIN),)


def _unattainable(error: DeadlineUnattainable) -> _Details:
    metadata = {
        "predicted_ms": str(round(error.predicted_s * 1000)),
        "available_ms": str(round(error.available_s * 1000)),
    }
    reason = "DEADLINE_UNATTAINABLE"
    return (error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata),)


def _resource(resource_type: str, name: str, message: str) -> error_details_pb2.ResourceInfo:
    return error_details_pb2.ResourceInfo(
        resource_type=resource_type,
        resource_name=_cut(name, _MAX_FIELD_BYTES),
        description=_cut(message, _MAX_MESSAGE_BYTES),
    )


def _request_info(request_id: str) -> error_details_pb2.RequestInfo:
    return error_details_pb2.RequestInfo(request_id=request_id)


def _cut(text: str, max_bytes: int) -> str:
    """Return the text, or as many whole characters as fit with an ellipsis."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= max_bytes:
        return text
    return encoded[: max_bytes - len("…".encode())].decode(errors="ignore") + "…"


_Row = tuple[grpc.StatusCode, Callable[[RillgateError], _Details]]


def _row(
    error_class: type[_Error], code: grpc.StatusCode, details_of: Callable[[_Error], _Details]
) -> tuple[type[RillgateError], _Row]:
    """Make a row whose details function is only called with its own class."""

    def checked(error: RillgateError) -> _Details:
        assert isinstance(error, error_class)
        return details_of(error)

    return error_class, (code, checked)


_TABLE: dict[type[RillgateError], _Row] = dict(
    # error class -> (status, details); what is not here is INTERNAL
    (
        _row(InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT, _bad_request),
        _row(ModelNotFound, grpc.StatusCode.NOT_FOUND, _model_resource),
        _row(VersionGone, grpc.StatusCode.NOT_FOUND, _version_resource),
        _row(ContinuationMismatch, grpc.StatusCode.FAILED_PRECONDITION, _precondition),
        _row(Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED, _retry),
        _row(DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED, _deadline),
        _row(DeadlineUnattainable, grpc.StatusCode.DEADLINE_EXCEEDED, _unattainable),
        _row(Draining, grpc.StatusCode.UNAVAILABLE, _retry),
        _row(NoReplica, grpc.StatusCode.UNAVAILABLE, _retry),
    )
)
