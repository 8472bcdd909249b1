"""A fake Rillgate server for the tests of programs that use the client.

It speaks the real protocol over real gRPC, on a free port of this machine, in this process:

    with FakeServer() as server, Client(server.target) as client:
        server.reply(FakeReply("42", reasoning_text="6 times 7"))
        assert client.generate("What is 6 times 7?").text == "42"
        assert server.requests[0].prompt == "What is 6 times 7?"

Owns the replies to give and the requests received. Has no model: a token is one byte of the reply's
UTF-8 (reasoning first), so a client sees half characters as from a real one. Without a reply to
give it repeats the prompt. Log-probabilities are not faked.
"""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import NoReturn, Self

import grpc

from rillgate._fake_wire import (
    MAX_CONTEXT_TOKENS,
    MODEL_VERSION,
    encode_details,
    handlers,
    status_response,
)
from rillgate.errors import FieldViolation
from rillgate.types import ChatMessage, FinishReason, Priority
from rillgate_proto.v1 import control_pb2
from rillgate_proto.v1 import inference_pb2 as pb

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}

_PRIORITIES: dict[int, str] = {
    pb.PRIORITY_HIGH: Priority.HIGH.value,
    pb.PRIORITY_NORMAL: Priority.NORMAL.value,
    pb.PRIORITY_LOW: Priority.LOW.value,
}


@dataclass(frozen=True, slots=True)
class FakeError:
    """How a call fails."""

    code: str
    """Name of a gRPC status: `UNAVAILABLE`, `INVALID_ARGUMENT`, …"""
    message: str = "as the test asked"
    retry_after_s: float | None = None
    violations: tuple[FieldViolation, ...] = ()
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class FakeReply:
    """One answer."""

    text: str
    reasoning_text: str = ""
    finish_reason: FinishReason = FinishReason.STOP
    stop_string: str = ""
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    hold_after: int | None = None
    """Says nothing more after so many tokens, until `release()` or the caller goes away."""
    fail_after: int | None = None
    """Breaks with `error` after so many tokens."""
    error: FakeError = field(default_factory=lambda: FakeError("UNAVAILABLE"))
    first_token_delay_s: float = 0.0
    token_interval_s: float = 0.0

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Give the tokens that this reply is sent as."""
        return tuple((self.reasoning_text + self.text).encode())


@dataclass(frozen=True, slots=True)
class FakeRequest:
    """What a caller asked: `prompt`, `messages` or `token_ids`, and the fields that were set."""

    prompt: str | None
    messages: tuple[ChatMessage, ...]
    token_ids: tuple[int, ...]
    options: dict[str, object]
    """By the names of GenerateOptions; texts, numbers, tuples and dicts."""
    timeout_s: float | None
    """What was left of the caller's deadline."""


class FakeServer:
    """Owns a server, its queue of replies and the requests so far; thread-safe."""

    def __init__(
        self,
        *,
        port: int = 0,
        num_threads: int = 64,
        tokens_per_message: int = 1,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        """Make a server, which starts with the `with` block; one thread per open stream.

        `port`: 0 takes a free one. `credentials`: speak TLS, as grpc.ssl_server_credentials says.
        """
        self.requests: list[FakeRequest] = []
        self.drains: list[control_pb2.DrainRequest] = []
        self._tokens_per_message = tokens_per_message
        self._replies: deque[FakeReply | FakeError] = deque()
        self._changed = threading.Condition()  # guards what follows, and the queue
        self._num_open = 0
        self._num_prompt_tokens = 0
        self._num_releases = 0
        self._num_cached_blocks = 10  # in each tier
        self._is_ready = True
        self._server = grpc.server(ThreadPoolExecutor(num_threads), handlers(self))
        address = f"127.0.0.1:{port}"
        bound_port = (
            self._server.add_insecure_port(address)
            if credentials is None
            else self._server.add_secure_port(address, credentials)
        )
        self.target = f"127.0.0.1:{bound_port}"

    def __repr__(self) -> str:
        """Show where it listens and what it holds."""
        return f"FakeServer({self.target}, replies={len(self._replies)}, open={self._num_open})"

    def __enter__(self) -> Self:
        """Start answering."""
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Break what is open, and stop."""
        self.release()
        self._server.stop(grace=None).wait()

    def reply(self, *replies: FakeReply | FakeError) -> None:
        """Queue answers for the next requests, one each."""
        with self._changed:
            self._replies.extend(replies)

    def release(self) -> None:
        """Let every held reply go on."""
        with self._changed:
            self._num_releases += 1
            self._changed.notify_all()

    def set_ready(self, is_ready: bool) -> None:
        """Choose what the health service says."""
        with self._changed:
            self._is_ready = is_ready
            self._changed.notify_all()

    @property
    def num_open(self) -> int:
        """Count the generations that are open now."""
        with self._changed:
            return self._num_open

    def wait_open(self, num: int, timeout_s: float = 10.0) -> bool:
        """Wait until exactly so many generations are open; False when that did not come."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_open == num, timeout_s)

    # -- what the handlers call -------------------------------------------------------------------

    def take_reply(self, request: FakeRequest) -> FakeReply | FakeError:
        """Record a request and choose its answer."""
        with self._changed:
            self.requests.append(request)
            self._num_prompt_tokens += num_prompt_tokens(request)
            if self._replies:
                return self._replies.popleft()
        if request.messages:
            return FakeReply(request.messages[-1].content)
        return FakeReply(request.prompt if request.prompt is not None else "ids")

    def answer(
        self, message: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        """Stream the answer to one request."""
        request = _to_request(message, context.time_remaining())
        reply = self.take_reply(request)
        if isinstance(reply, FakeError):
            fail(context, reply)
        self._count_open(1)
        context.add_callback(self._wake)
        try:
            yield from self._stream(message, request, reply, context)
        finally:
            self._count_open(-1)

    def _stream(
        self,
        message: pb.GenerateRequest,
        request: FakeRequest,
        reply: FakeReply,
        context: grpc.ServicerContext,
    ) -> Iterator[pb.GenerateResponse]:
        response = pb.GenerateResponse(started=_started(message, request, reply))
        token_ids, reason = _tokens(message, reply)
        given = {choice.index: len(choice.token_ids) for choice in message.continuation.choices}
        done = {c.index for c in message.continuation.choices if c.finish_reason}
        indices = [i for i in range(message.sampling.n or 1) if i not in done]
        begin = min((given.get(index, 0) for index in indices), default=0)
        if not self._pause(reply.first_token_delay_s, context):
            return
        if begin == 0 and not self._go_on(reply, 0, context):
            return
        for position in range(begin, len(token_ids), self._tokens_per_message):
            end = min(position + self._tokens_per_message, len(token_ids))
            for index in indices:
                first = max(position, given.get(index, 0))
                if first < end:
                    response.outputs.append(_output(index, token_ids, (first, end), reply))
            yield response
            response = pb.GenerateResponse()
            if not self._go_on(reply, end, context):
                return
            if not self._pause(reply.token_interval_s * (end - position), context):
                return
        for index in indices:
            usage = _usage(request, reply, len(token_ids))
            stop_string = reply.stop_string if reason == pb.FINISH_REASON_STOP_STRING else ""
            response.finished.add(
                choice_index=index, reason=reason, stop_string=stop_string, usage=usage
            )
        yield response

    def _go_on(self, reply: FakeReply, num_sent: int, context: grpc.ServicerContext) -> bool:
        """Fail or hold as the reply says; False when the caller is gone."""
        if reply.fail_after is not None and num_sent >= reply.fail_after:
            fail(context, reply.error)
        if reply.hold_after is not None and num_sent == reply.hold_after:
            with self._changed:
                before = self._num_releases
                self._changed.wait_for(
                    lambda: self._num_releases > before or not context.is_active()
                )
        return context.is_active()

    def _pause(self, delay_s: float, context: grpc.ServicerContext) -> bool:
        """Wait as long as the caller is there; False when it is gone."""
        if delay_s > 0:
            with self._changed:
                self._changed.wait_for(lambda: not context.is_active(), delay_s)
        return context.is_active()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _count_open(self, change: int) -> None:
        with self._changed:
            self._num_open += change
            self._changed.notify_all()

    def health(self, context: grpc.ServicerContext) -> Iterator[bool]:
        """Tell whether it is ready, and again at every change."""
        context.add_callback(self._wake)
        told: bool | None = None
        while context.is_active():
            with self._changed:
                while self._is_ready is told and context.is_active():
                    self._changed.wait()
                told = self._is_ready
            yield told

    def status(self) -> control_pb2.GetStatusResponse:
        """Tell what is open; one replica with a block per open generation."""
        with self._changed:
            return status_response(self._num_open, self._num_cached_blocks, self._num_prompt_tokens)

    def flush_cache(self) -> control_pb2.FlushCacheResponse:
        """Forget what is cached, which is little, and never comes back."""
        with self._changed:
            dropped, self._num_cached_blocks = self._num_cached_blocks, 0
        return control_pb2.FlushCacheResponse(
            num_replicas=1, num_device_blocks=dropped, num_host_blocks=dropped
        )

    def drain(self, message: control_pb2.DrainRequest) -> control_pb2.DrainResponse:
        """Record the wish; what is open stays open."""
        with self._changed:
            self.drains.append(message)
            return control_pb2.DrainResponse(num_open_requests=self._num_open)


def fail(context: grpc.ServicerContext, error: FakeError) -> NoReturn:
    """End a call with an error and its details; does not return."""
    code = grpc.StatusCode[error.code]
    details = encode_details(
        code, error.message, error.violations, error.retry_after_s, error.request_id
    )
    context.set_trailing_metadata((("grpc-status-details-bin", details),))
    context.abort(code, error.message)


def num_prompt_tokens(request: FakeRequest) -> int:
    """Count the prompt's tokens: its ids, or the bytes of its texts."""
    if request.token_ids:
        return len(request.token_ids)
    texts = [request.prompt or "", *(message.content for message in request.messages)]
    return sum(len(text.encode()) for text in texts)


def _to_request(message: pb.GenerateRequest, timeout_s: float | None) -> FakeRequest:
    options: dict[str, object] = {"model": message.model} if message.model else {}
    if message.priority:
        options["priority"] = _PRIORITIES[message.priority]
    for group in (message.sampling, message.stopping, message.response):
        for descriptor, value in group.ListFields():
            name = "stop" if descriptor.name == "stop_strings" else descriptor.name
            if name == "logit_bias":
                options[name] = dict(value)
            else:
                options[name] = value if isinstance(value, (int, float)) else tuple(value)
    return FakeRequest(
        prompt=message.prompt if message.WhichOneof("input") == "prompt" else None,
        messages=tuple(ChatMessage(m.role, m.content) for m in message.chat.messages),
        token_ids=tuple(message.token_ids.ids),
        options=options,
        # Without a deadline gRPC says 2^63 s.
        timeout_s=timeout_s if timeout_s is not None and timeout_s < 1e9 else None,
    )


def _tokens(message: pb.GenerateRequest, reply: FakeReply) -> tuple[bytes, pb.FinishReason]:
    """Cut the reply at max_tokens; repeat it up to there where no end may come before."""
    token_ids = bytes(reply.token_ids)
    max_tokens = message.stopping.max_tokens or MAX_CONTEXT_TOKENS
    if message.stopping.ignore_eos and token_ids:
        token_ids *= 1 + max_tokens // len(token_ids)
    if len(token_ids) > max_tokens or message.stopping.ignore_eos:
        return token_ids[:max_tokens], pb.FINISH_REASON_LENGTH
    return token_ids, _REASONS[reply.finish_reason]


def _output(index: int, token_ids: bytes, span: tuple[int, int], reply: FakeReply) -> pb.Output:
    """Send the tokens of a span, with the text that is whole by its end and was not before."""
    first, end = span
    num_reasoning = len(reply.reasoning_text.encode())
    answer_first, answer_end = max(0, first - num_reasoning), max(0, end - num_reasoning)
    return pb.Output(
        choice_index=index,
        token_offset=first,
        token_ids=token_ids[first:end],
        reasoning_text=_new_text(token_ids[:num_reasoning], first, end),
        text=_new_text(token_ids[num_reasoning:], answer_first, answer_end),
    )


def _new_text(text: bytes, first: int, end: int) -> str:
    before = text[:first].decode("utf-8", "ignore")
    return text[:end].decode("utf-8", "ignore")[len(before) :]


def _started(message: pb.GenerateRequest, request: FakeRequest, reply: FakeReply) -> pb.Started:
    return pb.Started(
        request_id="fake-request",
        model_version=MODEL_VERSION,
        seed=message.sampling.seed if message.sampling.HasField("seed") else 1,
        num_prompt_tokens=num_prompt_tokens(request),
        num_cached_tokens=reply.num_cached_tokens,
        prompt_digest=bytes(16),
        resumed=message.HasField("continuation"),
    )


def _usage(request: FakeRequest, reply: FakeReply, num_tokens: int) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=num_prompt_tokens(request),
        completion_tokens=num_tokens,
        cached_tokens=reply.num_cached_tokens,
        num_preemptions=reply.num_preemptions,
    )
