"""The client for ordinary, threaded code.

Owns one channel. Knows nothing of messages (`_convert_*`) and of what a stream adds up to
(`_accumulate`). One client serves any number of threads.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self, Unpack
from weakref import WeakSet

import grpc

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
from rillgate.config import DEFAULT_TARGET, ClientConfig
from rillgate.errors import RequestCancelledError, RillgateError, UnavailableError
from rillgate.status_types import FlushedCache, ServerStatus
from rillgate.sync_stream import GenerationStream
from rillgate.types import (
    GenerateOptions,
    Generation,
    Messages,
    ModelInfo,
    Prompt,
    Tokenization,
)
from rillgate_proto.v1 import control_pb2, inference_pb2


class Client:
    """Calls one Rillgate server, or several with the same models.

    Every method raises a subclass of RillgateError when the call fails. Use it in a `with` block or
    call `close`.
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
        self._streams: WeakSet[GenerationStream] = WeakSet()
        self._streams_lock = threading.Lock()
        plan = plan_channel(target, self._config)
        self._target = plan.target
        self._channel = (
            grpc.insecure_channel(plan.target, plan.options)
            if plan.credentials is None
            else grpc.secure_channel(plan.target, plan.credentials, plan.options)
        )

    def __repr__(self) -> str:
        """Show the target."""
        return f"Client({self._target!r})"

    def __enter__(self) -> Self:
        """Give the client itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        with self._streams_lock:
            streams = tuple(self._streams)
        for stream in streams:
            stream.close(RequestCancelledError("the client was closed"))
        self._channel.close()

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Generate an answer and return it whole."""
        request = generate_request(prompt, options)
        session = self._session(request, options)
        # Whole in one message is several times as cheap as streamed. Only where that broke, a
        # stream keeps what comes from then on.
        while not session.is_interrupted:
            try:
                whole = inference_pb2.CompleteRequest(request=request)
                return to_generation(self._call_once(COMPLETE, whole, session.remaining_s()))
            except RillgateError as error:
                wait_s = session.wait_before_next_s(error)
                if wait_s is None:
                    raise
            time.sleep(wait_s)
        with self._open_stream(session) as stream:
            return stream.collect()

    def chat(self, messages: Messages, **options: Unpack[GenerateOptions]) -> Generation:
        """Answer a conversation and return the answer whole."""
        return self.generate(messages, **options)

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> GenerationStream:
        """Generate an answer and give it as it comes; the call begins now."""
        return self._open_stream(self._session(generate_request(prompt, options), options))

    def chat_stream(
        self, messages: Messages, **options: Unpack[GenerateOptions]
    ) -> GenerationStream:
        """Answer a conversation and give the answer as it comes."""
        return self.stream(messages, **options)

    def batch(
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
        streams: set[GenerationStream] = set()
        is_failed = threading.Event()

        def run_one(prompt: Prompt) -> Generation:
            with self.stream(prompt, **options) as stream:
                streams.add(stream)
                if is_failed.is_set():  # too late to be among those that are closed below
                    stream.close()
                try:
                    return stream.collect()
                finally:
                    streams.discard(stream)

        with (
            progress_bar(len(prompts), "prompts", progress) as bar,
            ThreadPoolExecutor(max_concurrency) as pool,
        ):
            futures = [pool.submit(run_one, prompt) for prompt in prompts]
            pending = set(futures)
            try:
                while pending:
                    done, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    bar.advance(len(done))
            except BaseException:
                is_failed.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for stream in tuple(streams):
                    stream.close()
                raise
        return [future.result() for future in futures]

    def tokenize(
        self, prompt: str | Messages, *, model: str = "", timeout_s: float | None = None
    ) -> Tokenization:
        """Turn a text or a conversation into exactly the ids that generating would start from."""
        request = tokenize_request(prompt, model)
        return to_tokenization(self._call(TOKENIZE, request, timeout_s))

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        keep_special_tokens: bool = False,
        timeout_s: float | None = None,
    ) -> str:
        """Turn token ids into text; bytes that are no UTF-8 become U+FFFD."""
        request = detokenize_request(token_ids, model, keep_special_tokens)
        return self._call(DETOKENIZE, request, timeout_s).text

    def models(self, *, timeout_s: float | None = None) -> tuple[ModelInfo, ...]:
        """List the models that the server answers for."""
        request = inference_pb2.ListModelsRequest()
        return to_models(self._call(LIST_MODELS, request, timeout_s))

    def status(self, *, timeout_s: float | None = None) -> ServerStatus:
        """Say what the server and its replicas are doing now."""
        request = control_pb2.GetStatusRequest()
        return to_status(self._call(GET_STATUS, request, timeout_s))

    def flush_cache(self, *, model: str = "", timeout_s: float | None = None) -> FlushedCache:
        """Make the replicas (of one model, or all) forget cached blocks that no request uses."""
        request = flush_cache_request(model)
        return to_flushed(self._call(FLUSH_CACHE, request, timeout_s))

    def drain(
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
        return (self._call(DRAIN, request, timeout_s)).num_open_requests

    def wait_ready(self, timeout_s: float, model: str = "") -> None:
        """Wait until the server says that it (or one model of it) can answer.

        Raises UnavailableError when it does not within `timeout_s`.
        """
        deadline_s = time.monotonic() + timeout_s
        watch = self._channel.unary_stream(HEALTH_WATCH, health_request, is_serving)
        while (left_s := deadline_s - time.monotonic()) > 0:
            call = watch(model, timeout=left_s, wait_for_ready=True)
            try:
                if any(call):
                    return
            except grpc.RpcError:
                # A server that is just starting; wait_for_ready makes a closed port no busy loop.
                time.sleep(min(0.05, max(0.0, deadline_s - time.monotonic())))
            finally:
                call.cancel()
        raise UnavailableError(f"{self._target} was not ready within {timeout_s:g} s")

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

    def _open_stream(self, session: StreamSession) -> GenerationStream:
        call = self._channel.unary_stream(GENERATE.path, GENERATE.serialize, GENERATE.deserialize)
        stream = GenerationStream(
            lambda request, timeout_s: call(request, timeout=timeout_s), session
        )
        with self._streams_lock:
            self._streams.add(stream)
        return stream

    def _call(
        self, method: Method[RequestT, ResponseT], request: RequestT, timeout_s: float | None
    ) -> ResponseT:
        """Make a unary call, again where that can pay."""
        retry = self._retry(timeout_s)
        while True:
            try:
                return self._call_once(method, request, retry.remaining_s())
            except RillgateError as error:
                wait_s = retry.wait_before_retry_s(error)
                if wait_s is None:
                    raise
            time.sleep(wait_s)

    def _call_once(
        self, method: Method[RequestT, ResponseT], request: RequestT, timeout_s: float | None
    ) -> ResponseT:
        call = self._channel.unary_unary(method.path, method.serialize, method.deserialize)
        try:
            return call(request, timeout=timeout_s)
        except grpc.RpcError as rpc_error:
            raise error_of(rpc_error) from rpc_error
