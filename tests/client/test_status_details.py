"""Error details: read exactly as grpcio-status writes them."""

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from rillgate._fake_wire import encode_details
from rillgate._status_details import StatusDetails, parse_status_details
from rillgate.errors import FieldViolation

_DETAILS_KEY = "grpc-status-details-bin"


def _trailer(*details: Message) -> bytes:
    """Let grpcio-status write the trailer, as the server does."""
    status = status_pb2.Status(code=3, message="the message")
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    ((key, value),) = rpc_status.to_status(status).trailing_metadata
    assert key == _DETAILS_KEY
    assert isinstance(value, bytes)
    return value


def _bad_request(*violations: tuple[str, str]) -> error_details_pb2.BadRequest:
    entry = error_details_pb2.BadRequest.FieldViolation
    return error_details_pb2.BadRequest(
        field_violations=[entry(field=field, description=text) for field, text in violations]
    )


@given(
    violations=st.lists(st.tuples(st.text(max_size=300), st.text(max_size=300)), max_size=4),
    delay_ms=st.one_of(st.none(), st.integers(0, 10**9)),
    request_id=st.text(min_size=1, max_size=50),
)
def test_details_that_grpcio_status_writes_are_read_whole(
    violations: list[tuple[str, str]], delay_ms: int | None, request_id: str
) -> None:
    """Violations, delay and request id come back whatever they hold and in any mixture."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason="PASSED_OVER", metadata={"a": "b"}),
        _bad_request(*violations),
        error_details_pb2.RequestInfo(request_id=request_id),
    ]
    if delay_ms is not None:
        delay = Duration()
        delay.FromMilliseconds(delay_ms)
        details.insert(1, error_details_pb2.RetryInfo(retry_delay=delay))
    assert parse_status_details(_trailer(*details)) == StatusDetails(
        violations=tuple(FieldViolation(field, text) for field, text in violations),
        retry_after_s=None if delay_ms is None else delay_ms / 1000,
        request_id=request_id,
    )


def test_details_of_another_package_are_passed_over() -> None:
    """A message that is not google.rpc's is not read as if it were."""
    status = status_pb2.Status(code=3)
    value = _bad_request(("field", "text")).SerializeToString()
    status.details.add(type_url="type.example.com/other.BadRequest", value=value)
    assert parse_status_details(status.SerializeToString()) == StatusDetails()


@given(data=st.binary(max_size=200))
def test_broken_details_never_hide_the_error(data: bytes) -> None:
    """Whatever the bytes, reading them gives an answer and raises nothing."""
    assert isinstance(parse_status_details(data), StatusDetails)


def test_details_cut_anywhere_are_read_as_far_as_they_go() -> None:
    """A trailer that was cut raises nothing at any length."""
    whole = _trailer(_bad_request(("a", "b")), error_details_pb2.RequestInfo(request_id="r"))
    for length in range(len(whole)):
        parse_status_details(whole[:length])
    assert parse_status_details(whole).request_id == "r"


@given(
    violations=st.lists(st.tuples(st.text(max_size=300), st.text(max_size=300)), max_size=3),
    delay_us=st.one_of(st.none(), st.integers(0, 10**12)),
    message=st.text(max_size=300),
    request_id=st.text(max_size=50),
)
def test_the_fake_server_writes_what_googles_messages_read(
    violations: list[tuple[str, str]], delay_us: int | None, message: str, request_id: str
) -> None:
    """The fake's bytes are a google.rpc.Status to googleapis' own classes."""
    pairs = tuple(FieldViolation(field, text) for field, text in violations)
    delay_s = None if delay_us is None else delay_us / 1e6
    data = encode_details(grpc.StatusCode.INVALID_ARGUMENT, message, pairs, delay_s, request_id)
    status = status_pb2.Status.FromString(data)
    assert (status.code, status.message) == (3, message)
    unpacked: dict[str, Message] = {}
    for detail in status.details:
        for kind in (
            error_details_pb2.BadRequest,
            error_details_pb2.RetryInfo,
            error_details_pb2.RequestInfo,
        ):
            if detail.Is(kind.DESCRIPTOR):
                unpacked[kind.DESCRIPTOR.name] = kind.FromString(detail.value)
    expected: dict[str, Message] = {}
    if violations:
        expected["BadRequest"] = _bad_request(*violations)
    if delay_us is not None:
        delay = Duration()
        delay.FromMicroseconds(delay_us)
        expected["RetryInfo"] = error_details_pb2.RetryInfo(retry_delay=delay)
    if request_id:
        expected["RequestInfo"] = error_details_pb2.RequestInfo(request_id=request_id)
    assert unpacked == expected
