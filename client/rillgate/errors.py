"""The client's errors, by what the caller can do about them.

Owns the classes. Deliberately knows no gRPC type: `_status` makes these from what a call answers.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of the request that is out of its limits."""

    field: str
    """Path of the field, `sampling.temperature`."""
    description: str
    """The value, and what is allowed: `is 200; allowed: 0 to 100`."""

    def __str__(self) -> str:
        """Say field, value and limit in one line."""
        return f"{self.field} {self.description}"


class RillgateError(Exception):
    """Any failed call. The subclasses say what can be done about it."""

    code = "UNKNOWN"
    """Name of the gRPC status, `UNAVAILABLE`."""

    def __init__(self, message: str, *, request_id: str = "") -> None:
        """Take the server's message and, where it named one, its name for the request."""
        self.message = message
        self.request_id = request_id
        super().__init__(message)


class InvalidRequestError(RillgateError):
    """The request is out of its limits: sent again it fails again."""

    code = "INVALID_ARGUMENT"

    def __init__(
        self, message: str, violations: tuple[FieldViolation, ...] = (), *, request_id: str = ""
    ) -> None:
        """Take the fields that are wrong, as far as the server named them."""
        self.violations = violations
        super().__init__(message, request_id=request_id)


class MessageTooLargeError(InvalidRequestError):
    """A message is over the size limit of the server or of this client."""

    code = "RESOURCE_EXHAUSTED"


class ModelNotFoundError(RillgateError):
    """The model, or the version of it that a continuation names, is not served here."""

    code = "NOT_FOUND"


class ContinuationMismatchError(RillgateError):
    """A continuation does not belong to the request that carries it."""

    code = "FAILED_PRECONDITION"


class UnauthenticatedError(RillgateError):
    """The server does not know who calls."""

    code = "UNAUTHENTICATED"


class PermissionDeniedError(RillgateError):
    """The server knows who calls and refuses."""

    code = "PERMISSION_DENIED"


class RetryableError(RillgateError):
    """Nobody's fault: the same request can succeed later, or elsewhere."""

    def __init__(
        self, message: str, retry_after_s: float | None = None, *, request_id: str = ""
    ) -> None:
        """Take how long the server asks to wait; None: it did not say."""
        self.retry_after_s = retry_after_s
        super().__init__(message, request_id=request_id)


class OverloadedError(RetryableError):
    """The server has too much to do, for the deadline or at all, and did not queue the request."""

    code = "RESOURCE_EXHAUSTED"


class UnavailableError(RetryableError):
    """Nobody answers there now: not started, going down, or the network is broken."""

    code = "UNAVAILABLE"


class DeadlineExceededError(RillgateError):
    """The deadline passed, or not even an idle server could meet it: then the message has both the
    predicted and the available time, and the request was refused at once.
    """

    code = "DEADLINE_EXCEEDED"


class RequestCancelledError(RillgateError):
    """The call was cancelled on the way, not by the stream's own `close`."""

    code = "CANCELLED"


class UnsupportedError(RillgateError):
    """The server does not know this call: another version, or another kind of server."""

    code = "UNIMPLEMENTED"


class ServerFailureError(RillgateError):
    """A fault of the server. `request_id` finds it in the server's log."""

    code = "INTERNAL"


class ProtocolError(RillgateError):
    """The stream broke its own rules: a token missing, repeated, or no end."""

    code = "DATA_LOSS"
