"""What is known of the call under way, wherever the code stands that serves it.

Each call runs in an asyncio task of its own, so a context variable is the call's own too. The
interceptor opens it; servicers read the id and add fields to the call's line in the access log.
"""

import re
import uuid
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field

from rillgate_server.service.log_events import LogValue

REQUEST_ID_KEY = "x-request-id"
"""Metadata that carries a request id, both ways."""
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+=-]{0,127}")


@dataclass(frozen=True, slots=True)
class CallContext:
    """One call."""

    request_id: str
    """The caller's, when it sent a sane one."""
    log_fields: dict[str, LogValue] = field(default_factory=dict)
    """Name -> value, for the access log; never prompt text."""

    @classmethod
    def open(cls, metadata: Iterable[tuple[str, str | bytes]]) -> "CallContext":
        """Make the context of a call with these headers, and make it current."""
        call = cls(_request_id(metadata))
        _current.set(call)
        return call


def current_call() -> CallContext:
    """Return the context of the call that the running task serves."""
    return _current.get()


def _request_id(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Take the caller's id if it is sane in a log line and a header, else make one."""
    for key, value in metadata:
        if key == REQUEST_ID_KEY and isinstance(value, str) and _SANE_REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex


_current: ContextVar[CallContext] = ContextVar("rillgate_call")
