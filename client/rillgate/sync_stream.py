"""A stream of chunks for ordinary, threaded code.

Owns one call and what was received of it. Knows nothing of how a call is opened.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, Self

import grpc

from rillgate._accumulate import Accumulator
from rillgate._status import RetryState, error_of
from rillgate.errors import ProtocolError
from rillgate.types import Chunk, Continuation, Generation, Started, TokenLogprobs
from rillgate_proto.v1 import inference_pb2


class _Call(Protocol):
    """What gRPC gives for a streaming call."""

    def __iter__(self) -> Iterator[inference_pb2.GenerateResponse]: ...

    def cancel(self) -> bool | None: ...


class GenerationStream:
    """An answer as it comes: iterate it, at best in a `with` block, whose end closes it.

    Owns the call, the chunks received but not yet given, and the sum so far. Iterate it from one
    thread; `close` may come from any.
    """

    def __init__(
        self,
        open_call: Callable[[float | None], _Call],
        accumulator: Accumulator,
        retry: RetryState,
    ) -> None:
        """Begin the call; `open_call` takes the seconds that are left."""
        self._open_call = open_call
        self._accumulator = accumulator
        self._retry = retry
        self._closed = threading.Event()
        self._chunks: deque[Chunk] = deque()
        self._call = open_call(retry.remaining_s())
        self._messages = iter(self._call)

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
                self._chunks.extend(self._accumulator.push(message))
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

    def continuation(self) -> Continuation | None:
        """Give what it takes to go on from here with another stream; None before `started`."""
        return self._accumulator.continuation()

    def collect(self) -> Generation:
        """Receive the rest, and return everything, chunks that were already given included."""
        for _ in self:
            pass
        return self._accumulator.generation()

    def close(self) -> None:
        """Cancel what is left; the server frees it. Harmless when there is nothing left."""
        self._closed.set()
        self._call.cancel()

    def _receive(self) -> inference_pb2.GenerateResponse | None:
        """Wait for a message, calling again where that can pay; None at the end."""
        while not self._closed.is_set():
            try:
                return next(self._messages)
            except StopIteration:
                self._accumulator.generation()  # raises unless every choice has ended
                self._closed.set()
                return None
            except grpc.RpcError as rpc_error:
                if self._closed.is_set():
                    return None
                error = error_of(rpc_error)
                has_begun = self._accumulator.started is not None
                wait_s = None if has_begun else self._retry.wait_before_retry_s(error)
                if wait_s is None:
                    self._closed.set()
                    raise error from rpc_error
            if not self._closed.wait(wait_s):
                self._call = self._open_call(self._retry.remaining_s())
                self._messages = iter(self._call)
                if self._closed.is_set():  # meanwhile: `close` cancelled the call before this one
                    self._call.cancel()
        return None
