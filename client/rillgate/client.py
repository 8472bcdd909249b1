"""The client for asyncio.

Owns one channel. Knows nothing of messages (`_convert_*`) and of what a stream adds up to
(`_accumulate`). The same methods as `sync_client.Client`, awaited.
"""

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self, Unpack
from weakref import WeakSet

import grpc
import grpc.aio

from rillgate._accumulate import Accumulator
from rillgate._channel import plan_channel
from rillgate._convert_request import (
    detokenize_request,
    drain_request,
    flush_cache_request,
    generate_request,
    tokenize_request,
)
from rillgate._convert_response import to_generation, to_models, to_tokenization
from rillgate._convert_status import to_flushed, to_status
from rillgate._health import HEALTH_WATCH, health_request, is_serving
from rillgate._methods import (
    COMPLETE,
    DETOKENIZE,
    DRAIN,
    FLUSH_CACHE,
    GENERATE,
    GET_STATUS,
    LIST_MODELS,
    TOKENIZE,
    Method,
    RequestT,
    ResponseT,
)
from rillgate._progress import progress_bar
from rillgate._resume import StreamSession
from rillgate._status import RetryState, error_of
from rillgate.async_stream import AsyncGenerationStream
from rillgate.config import DEFAULT_TARGET, ClientConfig
from rillgate.errors import RequestCancelledError, RillgateError, UnavailableError
from rillgate.status_types import FlushedCache, ServerStatus
from rillgate.types import (
    GenerateOptions,
    Generation,
    Messages,
    ModelInfo,
    Prompt,
    Tokenization,
)
from rillgate_proto.v1 import control_pb2, inference_pb2


class AsyncClient:
    """Calls one Rillgate server, or several with the same models, from one event loop.

    Every method raises a subclass of RillgateError when the call fails. Use it in an `async with`
    block or await `close`.
    """

    def __init__(
        self,
        target: str | Sequence[str] = DEFAULT_TARGET,
        config: ClientConfig | None = None,
        *,
        resume: bool = True,
    ) -> None:
        """Prepare the connection, which is made with the first call.

        `target`: `host:port`, what gRPC's name syntax knows (`dns:///name:port`, `unix:///path`),
        or a sequence of `host:port`. `resume`: go on after a connection broke or a server went, on
        the same address or another, with every token exactly once; False: that is an error, and
        `continuation()` is what it takes to go on.
        """
        self._config = config or ClientConfig()
        self._resume = resume
        self._streams: WeakSet[AsyncGenerationStream] = WeakSet()
        self._plan = plan_channel(target, self._config)
        self._open_channel: grpc.aio.Channel | None = None

    def __repr__(self) -> str:
        """Show the target."""
        return f"AsyncClient({self._plan.target!r})"

    async def __aenter__(self) -> Self:
        """Give the client itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        for stream in tuple(self._streams):
            await stream.aclose(RequestCancelledError("the client was closed"))
        if self._open_channel is not None:
            await self._open_channel.close()

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Generate an answer and return it whole."""
        request = generate_request(prompt, options)
        session = self._session(request, options)
        # Whole in one message is several times as cheap as streamed. Only where that broke, a
        # stream keeps what comes from then on.
        while not session.is_interrupted:
            try:
                whole = inference_pb2.CompleteRequest(request=request)
                return to_generation(await self._call_once(COMPLETE, whole, session.remaining_s()))
            except RillgateError as error:
                wait_s = session.wait_before_next_s(error)
                if wait_s is None:
                    raise
            await asyncio.sleep(wait_s)
        async with self._open_stream(session) as stream:
            return await stream.collect()

    async def chat(self, messages: Messages, **options: Unpack[GenerateOptions]) -> Generation:
        """Answer a conversation and return the answer whole."""
        return await self.generate(messages, **options)

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncGenerationStream:
        """Generate an answer and give it as it comes; the call begins now. Not awaited."""
        return self._open_stream(self._session(generate_request(prompt, options), options))

    def chat_stream(
        self, messages: Messages, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerationStream:
        """Answer a conversation and give the answer as it comes. Not awaited."""
        return self.stream(messages, **options)

    async def batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_concurrency: int = 32,
        progress: bool | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[Generation]:
        """Generate answers to many prompts at once; results come in the prompts' order.

        `progress`: show a bar; None: where stderr is a terminal. The first error is raised and
        cancels what is under way.
        """
        free_places = asyncio.Semaphore(max_concurrency)
        with progress_bar(len(prompts), "prompts", progress) as bar:

            async def run_one(prompt: Prompt) -> Generation:
                async with free_places:
                    generation = await self.generate(prompt, **options)
                bar.advance()
                return generation

            tasks = [asyncio.create_task(run_one(prompt)) for prompt in prompts]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def tokenize(
        self, prompt: str | Messages, *, model: str = "", timeout_s: float | None = None
    ) -> Tokenization:
        """Turn a text or a conversation into exactly the ids that generating would start from."""
        request = tokenize_request(prompt, model)
        return to_tokenization(await self._call(TOKENIZE, request, timeout_s))

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        keep_special_tokens: bool = False,
        timeout_s: float | None = None,
    ) -> str:
        """Turn token ids into text; bytes that are no UTF-8 become U+FFFD."""
        request = detokenize_request(token_ids, model, keep_special_tokens)
        return (await self._call(DETOKENIZE, request, timeout_s)).text

    async def models(self, *, timeout_s: float | None = None) -> tuple[ModelInfo, ...]:
        """List the models that the server answers for."""
        request = inference_pb2.ListModelsRequest()
        return to_models(await self._call(LIST_MODELS, request, timeout_s))

    async def status(self, *, timeout_s: float | None = None) -> ServerStatus:
        """Say what the server and its replicas are doing now."""
        request = control_pb2.GetStatusRequest()
        return to_status(await self._call(GET_STATUS, request, timeout_s))

    async def flush_cache(self, *, model: str = "", timeout_s: float | None = None) -> FlushedCache:
        """Make the replicas (of one model, or all) forget cached blocks that no request uses."""
        request = flush_cache_request(model)
        return to_flushed(await self._call(FLUSH_CACHE, request, timeout_s))

    async def drain(
        self,
        replica_id: str = "",
        *,
        time_limit_s: float | None = None,
        undo: bool = False,
        timeout_s: float | None = None,
    ) -> int:
        """Take a replica (or all: the whole server) out of service; return its open requests.

        Answers when none is left, or after `time_limit_s` (None: the server's own grace). Running
        streams move to other replicas or finish. `undo` takes a replica back.
        """
        request = drain_request(replica_id, time_limit_s, undo)
        return (await self._call(DRAIN, request, timeout_s)).num_open_requests

    async def wait_ready(self, timeout_s: float, model: str = "") -> None:
        """Wait until the server says that it (or one model of it) can answer.

        Raises UnavailableError when it does not within `timeout_s`.
        """
        deadline_s = time.monotonic() + timeout_s
        watch = self._channel.unary_stream(HEALTH_WATCH, health_request, is_serving)
        while (left_s := deadline_s - time.monotonic()) > 0:
            call = watch(model, timeout=left_s, wait_for_ready=True)
            try:
                async for serving in call:
                    if serving:
                        return
            except grpc.aio.AioRpcError:
                # A server that is just starting; wait_for_ready makes a closed port no busy loop.
                await asyncio.sleep(min(0.05, max(0.0, deadline_s - time.monotonic())))
            finally:
                call.cancel()
        raise UnavailableError(f"{self._plan.target} was not ready within {timeout_s:g} s")

    @property
    def _channel(self) -> grpc.aio.Channel:
        """Make the channel with the first call: it belongs to the loop that runs then."""
        if self._open_channel is None:
            plan = self._plan
            self._open_channel = (
                grpc.aio.insecure_channel(plan.target, plan.options)
                if plan.credentials is None
                else grpc.aio.secure_channel(plan.target, plan.credentials, plan.options)
            )
        return self._open_channel

    def _retry(self, timeout_s: float | None) -> RetryState:
        limit_s = self._config.timeout_s if timeout_s is None else timeout_s
        return RetryState(self._config.retry, limit_s, time.monotonic)

    def _session(
        self, request: inference_pb2.GenerateRequest, options: GenerateOptions
    ) -> StreamSession:
        accumulator = Accumulator(options.get("n") or 1, options.get("continuation"))
        return StreamSession(
            request, accumulator, self._retry(options.get("timeout_s")), self._resume
        )

    def _open_stream(self, session: StreamSession) -> AsyncGenerationStream:
        call = self._channel.unary_stream(GENERATE.path, GENERATE.serialize, GENERATE.deserialize)
        stream = AsyncGenerationStream(
            lambda request, timeout_s: call(request, timeout=timeout_s), session
        )
        self._streams.add(stream)
        return stream

    async def _call(
        self, method: Method[RequestT, ResponseT], request: RequestT, timeout_s: float | None
    ) -> ResponseT:
        """Make a unary call, again where that can pay."""
        retry = self._retry(timeout_s)
        while True:
            try:
                return await self._call_once(method, request, retry.remaining_s())
            except RillgateError as error:
                wait_s = retry.wait_before_retry_s(error)
                if wait_s is None:
                    raise
            await asyncio.sleep(wait_s)

    async def _call_once(
        self, method: Method[RequestT, ResponseT], request: RequestT, timeout_s: float | None
    ) -> ResponseT:
        call = self._channel.unary_unary(method.path, method.serialize, method.deserialize)
        try:
            return await call(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as rpc_error:
            raise error_of(rpc_error) from rpc_error
