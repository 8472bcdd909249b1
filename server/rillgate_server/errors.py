"""The one tree of errors, by whose fault it is.

Messages give the numbers: asked, free, limit. `service.status_codes` turns the classes that a
caller may see into gRPC status; nothing here knows gRPC.
"""

from dataclasses import dataclass


class RillgateError(Exception):
    """Any error that Rillgate raises on purpose."""


# -- the caller's fault ---------------------------------------------------------------------------


@dataclass
class FieldViolation:
    """One field that is out of its limits."""

    field: str
    """Path of the field in the request, `sampling.temperature`."""
    value: str
    """The value, as text, cut to 200 characters."""
    allowed: str
    """What is allowed, in words and numbers."""

    def __str__(self) -> str:
        """Say field, value and limit in one line."""
        return f"{self.field} is {self.value}; allowed: {self.allowed}"


class InvalidRequest(RillgateError):
    """A field of the request is out of its limits."""

    def __init__(self, *violations: FieldViolation) -> None:
        """Take at least one violation."""
        self.violations = violations
        super().__init__("; ".join(map(str, violations)))

    @classmethod
    def of(cls, field: str, value: object, allowed: str) -> "InvalidRequest":
        """Build the error for one field; long values are cut."""
        text = str(value)
        return cls(FieldViolation(field, text if len(text) <= 200 else text[:197] + "...", allowed))


class ModelNotFound(RillgateError):
    """No such model here."""

    def __init__(self, model: str, available: tuple[str, ...]) -> None:
        """Name what was asked for and what there is."""
        self.model = model
        self.available = available
        super().__init__(
            f"model {model[:200]!r} is not served here; served: {', '.join(available)}"
        )


class VersionGone(RillgateError):
    """The version that a continuation names is not served any more."""

    def __init__(self, asked: str, served: str) -> None:
        """Name both versions."""
        self.asked = asked
        self.served = served
        super().__init__(f"model version {asked[:100]!r} is not served; served: {served!r}")


class ContinuationMismatch(RillgateError):
    """A continuation does not belong to the request that carries it."""

    def __init__(self, field: str, asked: str, actual: str) -> None:
        """Say what differs."""
        self.field = field
        super().__init__(
            f"continuation.{field} is {asked[:100]}, but this request gives {actual[:100]}"
        )


# -- nobody's fault: try later or elsewhere -------------------------------------------------------


class Overloaded(RillgateError):
    """The queue is full, or too full for the request's deadline."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        """Say the numbers, and when a retry can pay."""
        self.retry_after_s = retry_after_s
        super().__init__(message)


class DeadlineExceeded(RillgateError):
    """The deadline passed before anything could be sent."""


class DeadlineUnattainable(RillgateError):
    """The deadline could not be met by an idle server either; the request was never queued."""

    def __init__(self, predicted_s: float, available_s: float) -> None:
        """Take the predicted time to the first token, and what the deadline leaves."""
        self.predicted_s = predicted_s
        self.available_s = available_s
        super().__init__(
            f"the deadline cannot be met: the first token is predicted after {predicted_s:.3f} s "
            f"on an idle server, available: {available_s:.3f} s"
        )


class Draining(RillgateError):
    """This server is going down."""

    retry_after_s = 1.0


class NoReplica(RillgateError):
    """No replica can answer now."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        """Say what is missing."""
        self.retry_after_s = retry_after_s
        super().__init__(message)


class StreamLost(NoReplica):
    """A stream's replica was lost, and no other one went on with it in time."""

    def __init__(self, message: str, retry_after_s: float, continuation: dict[str, str]) -> None:
        """Take, beside that, what a continuation needs to name (its tokens were sent)."""
        self.continuation = continuation
        super().__init__(message, retry_after_s)


# -- our fault ------------------------------------------------------------------------------------


class EngineFailure(RillgateError):
    """A bug of ours; the caller sees the request id, never this text."""


class RankLost(RillgateError):
    """A rank of a split model died, fell silent or fell out of step: this replica cannot go on.

    No request's fault, so none is failed: the process ends, and what ran in it goes on elsewhere.
    """


# -- the operator's fault -------------------------------------------------------------------------


class ConfigError(RillgateError):
    """A setting is out of its limits; says field, value and limit."""


class CheckpointError(RillgateError):
    """A checkpoint cannot be served: a file is missing or broken, or the architecture unknown."""


class OutOfMemory(RillgateError):
    """Weights or cache do not fit; says needed and free bytes."""

    def __init__(self, what: str, needed_bytes: int, free_bytes: int) -> None:
        """Say needed and free."""
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        gib = 1 << 30
        super().__init__(
            f"{what} needs {needed_bytes / gib:.2f} GiB ({needed_bytes} bytes), "
            f"free: {free_bytes / gib:.2f} GiB ({free_bytes} bytes)"
        )
