"""A stream of chunks for ordinary, threaded code.

Owns the call under way and what waits to be given. Knows nothing of how a call is opened; what
follows after a break is `_resume`'s.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, Self

import grpc

from rillgate._resume import StreamSession
from rillgate._status import error_of
from rillgate.errors import ProtocolError, RillgateError
from rillgate.types import Chunk, Continuation, Generation, Started, TokenLogprobs
from rillgate_proto.v1 import inference_pb2


class _Call(Protocol):
    """What gRPC gives for a streaming call."""

    def __iter__(self) -> Iterator[inference_pb2.GenerateResponse]: ...

    def cancel(self) -> bool | None: ...


class GenerationStream:
    """An answer as it comes: iterate it, at best in a `with` block, whose end closes it.

    Owns the call, the chunks received but not yet given, and the sum so far. A connection that
    breaks is a pause: the stream goes on by itself unless its client was made with `resume=False`.
    Iterate it from one thread; `close` may come from any.
    """

    def __init__(
        self,
        open_call: Callable[[inference_pb2.GenerateRequest, float | None], _Call],
        session: StreamSession,
    ) -> None:
        """Begin the call; `open_call` takes the request and the seconds that are left."""
        self._open_call = open_call
        self._session = session
        self._accumulator = session.accumulator
        self._closed = threading.Event()
        self._chunks: deque[Chunk] = deque()
        self._closing_error: RillgateError | None = None
        self._begin_call()

    def __repr__(self) -> str:
        """Show what was received."""
        return f"GenerationStream({self._accumulator!r}, closed={self._closed.is_set()})"

    def __enter__(self) -> Self:
        """Give the stream itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def __iter__(self) -> Iterator[Chunk]:
        """Give the stream itself: it can be gone through once."""
        return self

    def __next__(self) -> Chunk:
        """Wait for the next chunk; raise RillgateError when the stream breaks."""
        while not self._chunks:
            message = self._receive()
            if message is None:
                raise StopIteration
            try:
                self._chunks.extend(self._session.push(message))
            except ProtocolError:
                self.close()
                raise
        return self._chunks.popleft()

    @property
    def started(self) -> Started | None:
        """Say what the server decided at the start; None until its first message."""
        return self._accumulator.started

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """Give the prompt's log-probabilities, as far as they came."""
        return self._accumulator.prompt_logprobs

    @property
    def num_resumes(self) -> int:
        """Say how often this stream went on after a break."""
        return self._accumulator.num_resumes

    def continuation(self) -> Continuation | None:
        """Give what it takes to go on from here with another stream; None before `started`."""
        return self._accumulator.continuation()

    def collect(self) -> Generation:
        """Receive the rest, and return everything, chunks that were already given included."""
        for _ in self:
            pass
        return self._accumulator.generation()

    def close(self, error: RillgateError | None = None) -> None:
        """Cancel what is left; the server frees it. Harmless when there is nothing left.

        `error`: what a thread that waits for a chunk gets; None: the stream's plain end.
        """
        if not self._closed.is_set():
            self._closing_error = error
        self._closed.set()
        self._call.cancel()

    def _begin_call(self) -> None:
        self._call = self._open_call(self._session.next_request(), self._session.remaining_s())
        self._messages = iter(self._call)

    def _receive(self) -> inference_pb2.GenerateResponse | None:
        """Wait for a message, calling again where that can pay; None at the end."""
        while not self._closed.is_set():
            try:
                return next(self._messages)
            except StopIteration:
                self._closed.set()
                self._accumulator.generation()  # raises unless every choice has ended
                return None
            except grpc.RpcError as rpc_error:
                if self._closed.is_set():
                    break
                error = error_of(rpc_error)
                if self._session.is_over(error):
                    self._closed.set()
                    return None
                wait_s = self._session.wait_before_next_s(error)
                if wait_s is None:
                    self._closed.set()
                    raise error from rpc_error
            if not self._closed.wait(wait_s):
                self._call_again()
        self._raise_closing_error()
        return None

    def _call_again(self) -> None:
        try:
            self._begin_call()
        except ValueError:  # gRPC's refusal to call on a channel that was closed meanwhile
            if not self._closed.is_set():
                raise
            return
        if self._closed.is_set():  # meanwhile: `close` cancelled the call before this one
            self._call.cancel()

    def _raise_closing_error(self) -> None:
        """Raise once what `close` was given."""
        error, self._closing_error = self._closing_error, None
        if error is not None:
            raise error
