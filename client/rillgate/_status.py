"""From gRPC's status to the client's errors, and the decision whether to try again.

Owns the table from status to error class, and what counts as a broken connection. Knows nothing of
streams and clients.
"""

import random
import re
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

_MAX_RESUME_BACKOFF_S = 2.0
"""A server that comes back is asked within about this time; asking costs next to nothing, because
gRPC answers for a server that it cannot reach."""

_TRANSPORT_CODES = ("INTERNAL", "UNKNOWN", "CANCELLED")
"""What gRPC and proxies make of a stream that was reset: `Received RST_STREAM with error code 2`,
`Stream removed`, `... error code 8`."""
_NO_CONNECTION = re.compile(
    r"all addresses|all backends|name resol|DNS resolution|address list", re.IGNORECASE
)
"""In gRPC's messages, 1.66 to 1.85, where a call never had a connection."""

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


def is_break(error: RillgateError) -> bool:
    """Tell whether something between caller and answer broke, or the server asks to come again.

    Rillgate names the request in every error of its own: a status without that name was made on the
    way. UNAVAILABLE is a break whoever says it.
    """
    if isinstance(error, RetryableError):
        return isinstance(error, UnavailableError) or error.retry_after_s is not None
    return error.code in _TRANSPORT_CODES and not error.request_id


def is_interruption(error: RillgateError) -> bool:
    """Tell whether a call that was under way broke: it was connected, and nobody refused it."""
    is_refused = isinstance(error, RetryableError) and error.retry_after_s is not None
    return is_break(error) and not is_refused and not _NO_CONNECTION.search(error.message)


def _read_details(trailers: Iterable[tuple[str, str | bytes]]) -> StatusDetails:
    for key, value in trailers:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            return parse_status_details(value)
    return StatusDetails()


class RetryState:
    """The retries of one request: how many were made in a row, and until when there is time.

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

    def note_progress(self) -> None:
        """Begin to count anew: something new was received."""
        self._num_failed = 0

    def wait_before_retry_s(self, error: RillgateError) -> float | None:
        """Count a failed attempt that received nothing; None: do not try again."""
        self._num_failed += 1
        if not isinstance(error, RetryableError) or self._num_failed >= self._config.max_attempts:
            return None
        if error.retry_after_s is not None:
            return self._if_time(_told_wait_s(error.retry_after_s))
        if isinstance(error, UnavailableError):
            return self._if_time(self._config.first_backoff_s * 2 ** (self._num_failed - 1))
        return None  # overloaded, and the server does not say that a retry can pay

    def wait_before_resume_s(self, error: RillgateError) -> float | None:
        """Count a break of a call that was under way; None: do not go on."""
        self._num_failed += 1
        if not is_break(error) or self._num_failed > self._config.max_resumes:
            return None
        if isinstance(error, RetryableError) and error.retry_after_s is not None:
            return self._if_time(_told_wait_s(error.retry_after_s))
        backoff_s = self._config.first_backoff_s * 2 ** (self._num_failed - 1)
        # Not all streams of a connection at once.
        return self._if_time(random.uniform(0.5, 1.0) * min(backoff_s, _MAX_RESUME_BACKOFF_S))

    def _if_time(self, wait_s: float) -> float | None:
        remaining_s = self.remaining_s()
        if wait_s > self._config.max_wait_s or (remaining_s is not None and wait_s >= remaining_s):
            return None
        return wait_s


def _told_wait_s(retry_after_s: float) -> float:
    """Never earlier than told, and not all who were told the same at once."""
    return retry_after_s * random.uniform(1.0, 1.1)
