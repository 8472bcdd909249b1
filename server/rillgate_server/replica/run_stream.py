"""One gateway's Run stream: its open requests, and the outputs that wait for it to read.

Owns the stream's books: which request_key is which request of the engine, which choices are open,
what was not written yet. The I/O thread alone touches it. Does not know gRPC or the engine.

    command --> open(key) ......... choices end, fail or are aborted --> closed; events dropped
    step    --> add() --> pending --> take() --> one message; while it is written, pending merges
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from rillgate_server.core.pending_output import PendingOutput, StepEntry
from rillgate_server.core.request import RequestRejected
from rillgate_server.core.step import (
    ChoiceFinished,
    ChoiceTokens,
    RequestFailed,
    StepOutput,
)

MAX_BUFFERED_TOKENS = 65_536
"""Past this a stalled reader loses its stream (contracts, section 2)."""


class OpenRequest:
    """A request of this stream that has not ended."""

    __slots__ = ("open_choices", "request_id", "request_key", "stream")

    def __init__(
        self, stream: "RunStream", request_key: int, request_id: int, choices: Sequence[int]
    ) -> None:
        """Note the stream, both numbers and the indices of the choices."""
        self.stream = stream
        self.request_key = request_key
        self.request_id = request_id
        self.open_choices = set(choices)


class UsedKeys:
    """The keys that a stream has used, in constant space while a gateway counts upwards."""

    def __init__(self) -> None:
        """Start with none used."""
        self._all_below = 1  # 1 .. _all_below - 1 are used
        self._others: set[int] = set()

    def add(self, key: int) -> bool:
        """Note `key`; False if it was used before."""
        if 1 <= key < self._all_below or key in self._others:
            return False
        self._others.add(key)
        while self._all_below in self._others:
            self._others.remove(self._all_below)
            self._all_below += 1
        return True


class RunStream:
    """The books of one Run stream.

    State: `requests` (open ones by key), the keys used so far, what waits to be written, whether
    the gateway has closed its side.
    """

    def __init__(self, max_buffered_tokens: int = MAX_BUFFERED_TOKENS) -> None:
        """Start with nothing open."""
        self.requests: dict[int, OpenRequest] = {}  # request_key -> open request
        self.used_keys = UsedKeys()
        self.overflowed = asyncio.Event()
        self._max_buffered_tokens = max_buffered_tokens
        self._pending = PendingOutput()
        self._rejected: deque[RequestRejected] = deque()
        self._is_half_closed = False
        self._is_writing = False
        self._wake = asyncio.Event()

    def __repr__(self) -> str:
        return (
            f"RunStream(open={len(self.requests)}, pending={self._pending!r}, "
            f"rejected={len(self._rejected)}, half_closed={self._is_half_closed})"
        )

    # -- what the gateway says ----------------------------------------------------------------

    def open(self, request_key: int, request_id: int, choices: Sequence[int]) -> OpenRequest:
        """Enter a request into the books; the key was new (`used_keys`)."""
        request = OpenRequest(self, request_key, request_id, choices)
        self.requests[request_key] = request
        return request

    def half_close(self) -> None:
        """Note that no command follows; the stream ends with its last open request."""
        self._is_half_closed = True
        self._wake.set()

    # -- what the engine says -----------------------------------------------------------------

    def add(self, step_id: int, request: OpenRequest, entry: StepEntry) -> None:
        """Keep an entry of a step for one of this stream's requests, and strike what it ends."""
        key = request.request_key
        if isinstance(entry, ChoiceTokens):
            if entry.choice_index in request.open_choices:  # else aborted
                self._pending.add_tokens(step_id, entry, key)
            return
        if isinstance(entry, ChoiceFinished):
            if entry.choice_index not in request.open_choices:
                return
            self.close_choices(request, (entry.choice_index,))
        elif isinstance(entry, RequestFailed):
            self.close_choices(request)
        self._pending.add(step_id, replace(entry, request_id=key))

    def add_rejected(self, rejected: RequestRejected) -> None:
        """Keep an answer that names a key which is not (or no longer) in the books."""
        self._rejected.append(rejected)
        self._wake.set()

    def close_choices(self, request: OpenRequest, choices: Sequence[int] = ()) -> None:
        """Strike choices (none named: all) from the books, and the request with its last one."""
        request.open_choices.difference_update(choices or tuple(request.open_choices))
        if not request.open_choices:
            self.requests.pop(request.request_key, None)

    def wake(self) -> None:
        """Let the writer see what the step gave; once per step, after its entries."""
        self._wake.set()
        if self._pending.num_tokens > self._max_buffered_tokens:
            self.overflowed.set()

    # -- the writer ---------------------------------------------------------------------------

    async def take(self) -> StepOutput | RequestRejected | None:
        """Wait for something to write; None: the stream is over."""
        while not (self._rejected or self._pending):
            if self._is_half_closed and not self.requests:
                return None
            self._wake.clear()
            await self._wake.wait()
        self._is_writing = True
        return self._rejected.popleft() if self._rejected else self._pending.take()

    def note_written(self) -> None:
        """Note that what `take` gave has been written."""
        self._is_writing = False

    @property
    def is_flushed(self) -> bool:
        """Whether nothing waits to be written or is being written."""
        return not (self._rejected or self._pending or self._is_writing)
