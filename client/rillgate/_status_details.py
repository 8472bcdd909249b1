"""Reads `grpc-status-details-bin`: google.rpc.Status with the details that Rillgate sends.

Owns the field numbers of the messages (google/rpc/{status,error_details}.proto). Deliberately
without googleapis-common-protos, which a client would need for this alone, and without generated
copies of those files: two packages that register google/rpc/status.proto cannot live in one
process. Protobuf itself reads the wire: a message without fields keeps everything as unknown.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from rillgate.errors import FieldViolation

_PREFIX = "google.rpc."

# Field numbers, from google/rpc/status.proto, google/rpc/error_details.proto and
# google/protobuf/any.proto.
_STATUS_DETAILS = 3
_ANY_TYPE_URL, _ANY_VALUE = 1, 2
_RETRY_INFO_DELAY = 1
_REQUEST_INFO_ID = 1
_BAD_REQUEST_VIOLATIONS = 1
_VIOLATION_FIELD, _VIOLATION_DESCRIPTION = 1, 2


@dataclass(frozen=True, slots=True)
class StatusDetails:
    """What the details say; empty where they say nothing."""

    violations: tuple[FieldViolation, ...] = ()
    retry_after_s: float | None = None
    request_id: str = ""


def parse_status_details(data: bytes) -> StatusDetails:
    """Read the trailer's bytes; what is unknown or broken is passed over.

    An error's details come beside its code and message: a fault in them must not hide the error.
    """
    violations: tuple[FieldViolation, ...] = ()
    retry_after_s: float | None = None
    request_id = ""
    try:
        for name, value in _details(data):
            if name == "BadRequest":
                violations = tuple(_violations(value))
            elif name == "RetryInfo":
                for delay in _submessages(value, _RETRY_INFO_DELAY):
                    retry_after_s = Duration.FromString(delay).ToMicroseconds() / 1e6
            elif name == "RequestInfo":
                request_id = _text(value, _REQUEST_INFO_ID)
    except DecodeError:
        pass
    return StatusDetails(violations, retry_after_s, request_id)


def _details(status: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield each detail's name without its package, and its bytes."""
    for detail in _submessages(status, _STATUS_DETAILS):
        full_name = _text(detail, _ANY_TYPE_URL).rpartition("/")[2]
        if full_name.startswith(_PREFIX):
            yield full_name.removeprefix(_PREFIX), next(_submessages(detail, _ANY_VALUE), b"")


def _violations(bad_request: bytes) -> Iterator[FieldViolation]:
    for violation in _submessages(bad_request, _BAD_REQUEST_VIOLATIONS):
        yield FieldViolation(
            _text(violation, _VIOLATION_FIELD), _text(violation, _VIOLATION_DESCRIPTION)
        )


def _text(message: bytes, number: int) -> str:
    return next(_submessages(message, number), b"").decode("utf-8", "replace")


def _submessages(message: bytes, number: int) -> Iterator[bytes]:
    """Yield the length-delimited values (messages, texts) of one field."""
    for field in UnknownFieldSet(Empty.FromString(message)):  # type: ignore[attr-defined]
        if field.field_number == number and isinstance(field.data, bytes):
            yield field.data
