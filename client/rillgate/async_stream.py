"""A stream of chunks for asyncio.

Owns the call under way and what waits to be given. Knows nothing of how a call is opened; what
follows after a break is `_resume`'s.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

import grpc.aio

from rillgate._resume import StreamSession
from rillgate._status import error_of
from rillgate.errors import ProtocolError, RillgateError
from rillgate.types import Chunk, Continuation, Generation, Started, TokenLogprobs
from rillgate_proto.v1 import inference_pb2

_Call = grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]


class AsyncGenerationStream:
    """An answer as it comes: iterate it, at best in an `async with` block, whose end closes it.

    Owns the call, the chunks received but not yet given, and the sum so far. A connection that
    breaks is a pause: the stream goes on by itself unless its client was made with `resume=False`.
    Cancelling the task that waits for a chunk cancels the call.
    """

    def __init__(
        self,
        open_call: "Callable[[inference_pb2.GenerateRequest, float | None], _Call]",
        session: StreamSession,
    ) -> None:
        """Begin the call; `open_call` takes the request and the seconds that are left."""
        self._open_call = open_call
        self._session = session
        self._accumulator = session.accumulator
        self._closed = asyncio.Event()
        self._chunks: deque[Chunk] = deque()
        self._closing_error: RillgateError | None = None
        self._begin_call()

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
                self._chunks.extend(self._session.push(message))
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

    @property
    def num_resumes(self) -> int:
        """Say how often this stream went on after a break."""
        return self._accumulator.num_resumes

    def continuation(self) -> Continuation | None:
        """Give what it takes to go on from here with another stream; None before `started`."""
        return self._accumulator.continuation()

    async def collect(self) -> Generation:
        """Receive the rest, and return everything, chunks that were already given included."""
        async for _ in self:
            pass
        return self._accumulator.generation()

    async def aclose(self, error: RillgateError | None = None) -> None:
        """Cancel what is left; the server frees it. Harmless when there is nothing left.

        `error`: what a task that waits for a chunk gets; None: the stream's plain end.
        """
        if not self._closed.is_set():
            self._closing_error = error
        self._closed.set()
        self._call.cancel()

    def _begin_call(self) -> None:
        self._call = self._open_call(self._session.next_request(), self._session.remaining_s())
        self._messages = aiter(self._call)

    async def _receive(self) -> inference_pb2.GenerateResponse | None:
        """Wait for a message, calling again where that can pay; None at the end."""
        while not self._closed.is_set():
            try:
                return await anext(self._messages)
            except StopAsyncIteration:
                self._closed.set()
                self._accumulator.generation()  # raises unless every choice has ended
                return None
            except asyncio.CancelledError:
                # gRPC also raises this in the reader when another task closes the stream.
                if self._closed.is_set() and not _is_task_cancelled():
                    break
                await self.aclose()
                raise
            except grpc.aio.AioRpcError as rpc_error:
                error = error_of(rpc_error)
                if self._session.is_over(error):
                    self._closed.set()
                    return None
                wait_s = self._session.wait_before_next_s(error)
                if wait_s is None:
                    self._closed.set()
                    raise error from rpc_error
            await self._wait_closed(wait_s)
            if not self._closed.is_set():
                self._begin_call()
        self._raise_closing_error()
        return None

    async def _wait_closed(self, timeout_s: float) -> None:
        """Wait before the next call, or until there is none."""
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._closed.wait()
        except asyncio.CancelledError:
            self._closed.set()
            raise

    def _raise_closing_error(self) -> None:
        """Raise once what `aclose` was given."""
        error, self._closing_error = self._closing_error, None
        if error is not None:
            raise error


def _is_task_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
