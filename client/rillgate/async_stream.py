"""A stream of chunks for asyncio.

Owns one call and what was received of it. Knows nothing of how a call is opened.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

import grpc.aio

from rillgate._accumulate import Accumulator
from rillgate._status import RetryState, error_of
from rillgate.errors import ProtocolError
from rillgate.types import Chunk, Continuation, Generation, Started, TokenLogprobs
from rillgate_proto.v1 import inference_pb2

_Call = grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]


class AsyncGenerationStream:
    """An answer as it comes: iterate it, at best in an `async with` block, whose end closes it.

    Owns the call, the chunks received but not yet given, and the sum so far. Cancelling the task
    that waits for a chunk cancels the call.
    """

    def __init__(
        self,
        open_call: "Callable[[float | None], _Call]",
        accumulator: Accumulator,
        retry: RetryState,
    ) -> None:
        """Begin the call; `open_call` takes the seconds that are left."""
        self._open_call = open_call
        self._accumulator = accumulator
        self._retry = retry
        self._closed = asyncio.Event()
        self._chunks: deque[Chunk] = deque()
        self._call = open_call(retry.remaining_s())
        self._messages = aiter(self._call)

    def __repr__(self) -> str:
        """Show what was received."""
        return f"AsyncGenerationStream({self._accumulator!r}, closed={self._closed.is_set()})"

    async def __aenter__(self) -> Self:
        """Give the stream itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        await self.aclose()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        """Give the stream itself: it can be gone through once."""
        return self

    async def __anext__(self) -> Chunk:
        """Wait for the next chunk; raise RillgateError when the stream breaks."""
        while not self._chunks:
            message = await self._receive()
            if message is None:
                raise StopAsyncIteration
            try:
                self._chunks.extend(self._accumulator.push(message))
            except ProtocolError:
                await self.aclose()
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

    async def collect(self) -> Generation:
        """Receive the rest, and return everything, chunks that were already given included."""
        async for _ in self:
            pass
        return self._accumulator.generation()

    async def aclose(self) -> None:
        """Cancel what is left; the server frees it. Harmless when there is nothing left."""
        self._closed.set()
        self._call.cancel()

    async def _receive(self) -> inference_pb2.GenerateResponse | None:
        """Wait for a message, calling again where that can pay; None at the end."""
        while not self._closed.is_set():
            try:
                return await anext(self._messages)
            except StopAsyncIteration:
                self._accumulator.generation()  # raises unless every choice has ended
                self._closed.set()
                return None
            except asyncio.CancelledError:
                # gRPC also raises this in the reader when another task closes the stream.
                if self._closed.is_set() and not _is_task_cancelled():
                    return None
                self._closed.set()
                self._call.cancel()
                raise
            except grpc.aio.AioRpcError as rpc_error:
                error = error_of(rpc_error)
                has_begun = self._accumulator.started is not None
                wait_s = None if has_begun else self._retry.wait_before_retry_s(error)
                if wait_s is None:
                    self._closed.set()
                    raise error from rpc_error
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), wait_s)
                return None
            self._call = self._open_call(self._retry.remaining_s())
            self._messages = aiter(self._call)
        return None


def _is_task_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
