"""From gRPC's status to the client's errors, and the decision whether to try again.

Owns the table from status to error class. Knows nothing of streams and clients.
"""

import random
from collections.abc import Callable, Iterable
from typing import cast

import grpc

from rillgate._status_details import StatusDetails, parse_status_details
from rillgate.config import RetryConfig
from rillgate.errors import (
    ContinuationMismatchError,
    DeadlineExceededError,
    InvalidRequestError,
    MessageTooLargeError,
    ModelNotFoundError,
    OverloadedError,
    PermissionDeniedError,
    RequestCancelledError,
    RetryableError,
    RillgateError,
    ServerFailureError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)

_DETAILS_KEY = "grpc-status-details-bin"

_CLASSES: dict[grpc.StatusCode, type[RillgateError]] = {
    # what the server answers -> what the caller catches (the others carry more than a message)
    grpc.StatusCode.NOT_FOUND: ModelNotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: ContinuationMismatchError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
    grpc.StatusCode.INTERNAL: ServerFailureError,
    grpc.StatusCode.UNKNOWN: ServerFailureError,
    grpc.StatusCode.DATA_LOSS: ServerFailureError,
}


def error_of(rpc_error: grpc.RpcError) -> RillgateError:
    """Make the client's error from what either kind of gRPC call raised."""
    code = rpc_error.code()
    text = rpc_error.details() or code.name
    # Pairs in both kinds of call; the annotations know only one kind, by attribute.
    trailers = cast(Iterable[tuple[str, str | bytes]], rpc_error.trailing_metadata() or ())
    details = _read_details(trailers)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequestError(text, details.violations, request_id=details.request_id)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # gRPC itself refuses a message over the limit, on either side, with this status.
        if details.retry_after_s is None and "larger than max" in text:
            return MessageTooLargeError(text, details.violations, request_id=details.request_id)
        return OverloadedError(text, details.retry_after_s, request_id=details.request_id)
    if code is grpc.StatusCode.UNAVAILABLE:
        return UnavailableError(text, details.retry_after_s, request_id=details.request_id)
    error = _CLASSES.get(code, RillgateError)(text, request_id=details.request_id)
    error.code = code.name
    return error


def _read_details(trailers: Iterable[tuple[str, str | bytes]]) -> StatusDetails:
    for key, value in trailers:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            return parse_status_details(value)
    return StatusDetails()


class RetryState:
    """The retries of one request: how many were made, and until when there is time.

    Owns the count. Waiting is the caller's: one client sleeps, the other awaits.
    """

    def __init__(
        self, config: RetryConfig, timeout_s: float | None, clock: Callable[[], float]
    ) -> None:
        """Start the deadline, where there is one, now."""
        self._config = config
        self._clock = clock
        self._deadline_s = None if timeout_s is None else clock() + timeout_s
        self._num_failed = 0

    def __repr__(self) -> str:
        """Show the count and the time left."""
        return f"RetryState(num_failed={self._num_failed}, remaining_s={self.remaining_s()})"

    def remaining_s(self) -> float | None:
        """Say how much of the deadline is left, at least 0; None: there is no deadline."""
        if self._deadline_s is None:
            return None
        return max(0.0, self._deadline_s - self._clock())

    def wait_before_retry_s(self, error: RillgateError) -> float | None:
        """Count a failed attempt that received nothing; None: do not try again."""
        self._num_failed += 1
        if not isinstance(error, RetryableError) or self._num_failed >= self._config.max_attempts:
            return None
        if error.retry_after_s is not None:
            # Never earlier than told, and not all who were told the same at once.
            wait_s = error.retry_after_s * random.uniform(1.0, 1.1)
        elif isinstance(error, UnavailableError):
            wait_s = self._config.first_backoff_s * 2 ** (self._num_failed - 1)
        else:  # overloaded, and the server does not say that a retry can pay
            return None
        remaining_s = self.remaining_s()
        if wait_s > self._config.max_wait_s or (remaining_s is not None and wait_s >= remaining_s):
            return None
        return wait_s
