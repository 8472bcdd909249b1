"""From gRPC's status to errors, and when another attempt is made; on a virtual clock."""

import grpc
import grpc.aio
import pytest

from rillgate import errors
from rillgate._fake_wire import encode_details
from rillgate._status import RetryState, error_of
from rillgate.config import RetryConfig
from rillgate.errors import RillgateError


class _Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def _rpc_error(code: grpc.StatusCode, message: str, details: bytes | None = None) -> grpc.RpcError:
    trailers = () if details is None else (("grpc-status-details-bin", details),)
    return grpc.aio.AioRpcError(code, None, grpc.aio.Metadata(*trailers), message)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.name != "OK"])
def test_every_status_becomes_an_error_that_names_it(code: grpc.StatusCode) -> None:
    """Whatever the server answers, the caller catches a RillgateError with that status."""
    error = error_of(_rpc_error(code, "the message"))
    assert isinstance(error, RillgateError)
    assert (error.code, error.message, str(error)) == (code.name, "the message", "the message")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_ARGUMENT", errors.InvalidRequestError),
        ("NOT_FOUND", errors.ModelNotFoundError),
        ("FAILED_PRECONDITION", errors.ContinuationMismatchError),
        ("RESOURCE_EXHAUSTED", errors.OverloadedError),
        ("UNAVAILABLE", errors.UnavailableError),
        ("DEADLINE_EXCEEDED", errors.DeadlineExceededError),
        ("UNAUTHENTICATED", errors.UnauthenticatedError),
        ("PERMISSION_DENIED", errors.PermissionDeniedError),
        ("CANCELLED", errors.RequestCancelledError),
        ("UNIMPLEMENTED", errors.UnsupportedError),
        ("INTERNAL", errors.ServerFailureError),
    ],
)
def test_a_status_has_its_class(code: str, kind: type[RillgateError]) -> None:
    """The table of the design, seen from the client."""
    assert type(error_of(_rpc_error(grpc.StatusCode[code], "x"))) is kind


def test_details_reach_the_error() -> None:
    """Violations, the wait and the request id come from the trailer."""
    violation = errors.FieldViolation("sampling.top_p", "is 7; allowed: (0, 1]")
    code = grpc.StatusCode.INVALID_ARGUMENT
    data = encode_details(code, "m", (violation,), None, "req-1")
    invalid = error_of(_rpc_error(code, "m", data))
    assert isinstance(invalid, errors.InvalidRequestError)
    assert (invalid.violations, invalid.request_id) == ((violation,), "req-1")
    assert str(violation) == "sampling.top_p is 7; allowed: (0, 1]"
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    overloaded = error_of(_rpc_error(code, "m", encode_details(code, "m", (), 1.5, "")))
    assert isinstance(overloaded, errors.OverloadedError)
    assert overloaded.retry_after_s == 1.5


def test_grpcs_own_refusal_of_a_large_message_is_the_callers_fault() -> None:
    """It comes with the status of an overload, but a retry cannot pay."""
    message = "CLIENT: Sent message larger than max (5000000 vs. 4194304)"
    error = error_of(_rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED, message))
    assert isinstance(error, errors.MessageTooLargeError)
    assert isinstance(error, errors.InvalidRequestError)


def test_waits_grow_where_the_server_names_none() -> None:
    """0.1, 0.2, 0.4 s, then the attempts are used up."""
    retry = RetryState(RetryConfig(max_attempts=4), None, _Clock())
    error = errors.UnavailableError("gone")
    waits = [retry.wait_before_retry_s(error) for _ in range(4)]
    assert waits == [0.1, 0.2, 0.4, None]


def test_the_servers_wait_is_kept_and_at_most_a_tenth_longer() -> None:
    """Never earlier than told, nor all at the same moment."""
    waits = {
        RetryState(RetryConfig(), None, _Clock()).wait_before_retry_s(
            errors.OverloadedError("full", 2.0)
        )
        for _ in range(50)
    }
    assert len(waits) > 10
    assert all(wait_s is not None and 2.0 <= wait_s <= 2.2 for wait_s in waits)


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequestError("wrong"),
        errors.ServerFailureError("broken"),
        errors.DeadlineExceededError("late"),
        errors.OverloadedError("full", None),
        errors.OverloadedError("full", 31.0),
    ],
)
def test_what_a_retry_cannot_mend_is_not_tried_again(error: RillgateError) -> None:
    """Only errors that say a retry can pay, and soon enough, are waited for."""
    retry = RetryState(RetryConfig(max_wait_s=30), None, _Clock())
    assert retry.wait_before_retry_s(error) is None


def test_the_deadline_counts_over_all_attempts() -> None:
    """The time left shrinks with the clock, and a wait beyond it is not begun."""
    clock = _Clock()
    retry = RetryState(RetryConfig(max_attempts=9), 10.0, clock)
    assert retry.remaining_s() == 10.0
    clock.now_s += 7
    assert retry.remaining_s() == 3.0
    assert retry.wait_before_retry_s(errors.OverloadedError("full", 2.0)) is not None
    assert retry.wait_before_retry_s(errors.OverloadedError("full", 3.0)) is None
    clock.now_s += 5
    assert retry.remaining_s() == 0.0
