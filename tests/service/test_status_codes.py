"""The table from errors to status: every class has its row, and details fit into trailers."""

from base64 import b64encode
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from rillgate_server import errors
from rillgate_server.errors import FieldViolation, InvalidRequest, RillgateError
from rillgate_server.service.status_codes import MAX_STATUS_BYTES, is_callers_business, status_of

Code = grpc.StatusCode

EXAMPLES: dict[type[RillgateError], tuple[RillgateError, Code, tuple[type[Any], ...]]] = {
    # class -> (an instance, its status, its details)
    errors.InvalidRequest: (
        InvalidRequest.of("sampling.n", 0, "1 to 64"),
        Code.INVALID_ARGUMENT,
        (error_details_pb2.BadRequest,),
    ),
    errors.ModelNotFound: (
        errors.ModelNotFound("gpt", ("demo",)),
        Code.NOT_FOUND,
        (error_details_pb2.ResourceInfo,),
    ),
    errors.VersionGone: (
        errors.VersionGone("a", "b"),
        Code.NOT_FOUND,
        (error_details_pb2.ResourceInfo,),
    ),
    errors.ContinuationMismatch: (
        errors.ContinuationMismatch("seed", "1", "2"),
        Code.FAILED_PRECONDITION,
        (error_details_pb2.PreconditionFailure,),
    ),
    errors.Overloaded: (
        errors.Overloaded("the queue holds 9 of 9 requests", 2.5),
        Code.RESOURCE_EXHAUSTED,
        (error_details_pb2.RetryInfo, error_details_pb2.ErrorInfo),
    ),
    errors.DeadlineExceeded: (
        errors.DeadlineExceeded("too late"),
        Code.DEADLINE_EXCEEDED,
        (error_details_pb2.ErrorInfo,),
    ),
    errors.DeadlineUnattainable: (
        errors.DeadlineUnattainable(2.5, 1.25),
        Code.DEADLINE_EXCEEDED,
        (error_details_pb2.ErrorInfo,),
    ),
    errors.Draining: (
        errors.Draining("going down"),
        Code.UNAVAILABLE,
        (error_details_pb2.RetryInfo, error_details_pb2.ErrorInfo),
    ),
    errors.NoReplica: (
        errors.NoReplica("none"),
        Code.UNAVAILABLE,
        (error_details_pb2.RetryInfo, error_details_pb2.ErrorInfo),
    ),
    errors.StreamLost: (
        errors.StreamLost("lost", 1.0, {"seed": "7"}),
        Code.UNAVAILABLE,
        (error_details_pb2.RetryInfo, error_details_pb2.ErrorInfo),
    ),
}
OPERATORS_AND_OURS: dict[type[RillgateError], RillgateError] = {
    errors.EngineFailure: errors.EngineFailure("secret"),
    errors.RankLost: errors.RankLost("secret"),
    errors.ConfigError: errors.ConfigError("secret"),
    errors.CheckpointError: errors.CheckpointError("secret"),
    errors.OutOfMemory: errors.OutOfMemory("secret", 2, 1),
}


def subclasses(error_class: type[RillgateError]) -> Iterator[type[RillgateError]]:
    """Walk the tree of errors."""
    for subclass in error_class.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def details(status: status_pb2.Status, kind: type[Any]) -> Any:
    """Return the one detail of a kind."""
    (packed,) = (it for it in status.details if it.Is(kind.DESCRIPTOR))
    found = kind()
    packed.Unpack(found)
    return found


def test_every_error_is_in_the_table_or_nobodys_business() -> None:
    """A new class must choose: a row of its own, or INTERNAL. (A subclass may share a row.)"""
    known = tuple(EXAMPLES) + tuple(OPERATORS_AND_OURS)
    ours = [it for it in subclasses(RillgateError) if it.__module__ == errors.__name__]
    assert len(ours) >= len(known)
    assert [it for it in ours if it not in known] == []


@pytest.mark.parametrize("error_class", EXAMPLES, ids=lambda it: it.__name__)
def test_an_error_has_the_status_and_details_of_its_row(error_class: type[RillgateError]) -> None:
    """The message is the error's own; the details are typed; the request is named."""
    error, code, kinds = EXAMPLES[error_class]
    status = status_of(error, "req-1")
    assert status.code == code.value[0]
    assert status.message == str(error)
    for kind in kinds:
        assert details(status, kind).ByteSize() > 0
    assert details(status, error_details_pb2.RequestInfo).request_id == "req-1"
    assert is_callers_business(error)


@pytest.mark.parametrize(
    "error",
    [*OPERATORS_AND_OURS.values(), ValueError("secret"), KeyError("secret")],
    ids=lambda it: type(it).__name__,
)
def test_what_is_nobodys_business_is_internal_with_the_request_id_alone(error: Exception) -> None:
    """The caller learns where to look it up, and nothing of the exception's text."""
    status = status_of(error, "req-1")
    assert status.code == Code.INTERNAL.value[0]
    assert "secret" not in str(status)
    assert "req-1" in status.message
    info = details(status, error_details_pb2.ErrorInfo)
    assert info.metadata["request_id"] == "req-1"
    assert not is_callers_business(error)


def test_a_retry_is_told_in_time() -> None:
    """RetryInfo carries the predicted drain time."""
    status = status_of(errors.Overloaded("full", 2.5), "r")
    assert details(
        status, error_details_pb2.RetryInfo
    ).retry_delay.ToTimedelta().total_seconds() == (2.5)


def test_an_unattainable_deadline_tells_predicted_and_available() -> None:
    """For people in the message, for programs in the details."""
    status = status_of(errors.DeadlineUnattainable(2.5, 1.25), "r")
    assert "predicted after 2.500 s" in status.message
    assert "available: 1.250 s" in status.message
    info = details(status, error_details_pb2.ErrorInfo)
    assert info.reason == "DEADLINE_UNATTAINABLE"
    assert dict(info.metadata) == {"predicted_ms": "2500", "available_ms": "1250"}


def test_bad_request_names_each_field_with_value_and_limit() -> None:
    """One FieldViolation per field."""
    error = InvalidRequest(FieldViolation("a.b", "3", "1 to 2"), FieldViolation("c", "x", "y"))
    found = details(status_of(error, "r"), error_details_pb2.BadRequest).field_violations
    assert [(it.field, it.description) for it in found] == [
        ("a.b", "is 3; allowed: 1 to 2"),
        ("c", "is x; allowed: y"),
    ]


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest(*[FieldViolation("f" * 500, "v" * 5000, "a" * 5000)] * 100),
        InvalidRequest(FieldViolation("世" * 5000, "界" * 5000, "和" * 5000)),
        errors.ModelNotFound("m" * 100_000, ("demo",) * 1000),
        errors.ContinuationMismatch("seed", "1" * 10_000, "2" * 10_000),
        errors.NoReplica("n" * 100_000),
    ],
    ids=["many fields", "wide characters", "long names", "long values", "long message"],
)
def test_a_status_fits_into_trailers_however_long_its_values(error: RillgateError) -> None:
    """At most 4 KiB; the first detail is kept."""
    status = status_of(error, "r" * 128)
    assert status.ByteSize() <= MAX_STATUS_BYTES
    assert status.details


def test_an_error_in_any_script_fits_into_trailers_of_8_kib() -> None:
    """The message stands in the trailers percent-encoded, and again in the details as base64."""
    emoji = "\N{GRINNING FACE}" * 1000
    error = InvalidRequest(FieldViolation("chat.messages", emoji, emoji))
    status = status_of(error, "r" * 128)
    assert details(status, error_details_pb2.BadRequest).field_violations
    num_bytes = len(quote(status.message)) + len(b64encode(status.SerializeToString()))
    assert num_bytes <= 7500, "with 500 for the other trailers"
    assert status.message.endswith("…")
    assert "\N{REPLACEMENT CHARACTER}" not in status.message
