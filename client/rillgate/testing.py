"""A fake Rillgate server for the tests of programs that use the client.

It speaks the real protocol over real gRPC, on a free port of this machine, in this process:

    with FakeServer() as server, Client(server.target) as client:
        server.reply(FakeReply("42", reasoning_text="6 times 7"))
        assert client.generate("What is 6 times 7?").text == "42"
        assert server.requests[0].prompt == "What is 6 times 7?"

A continuation goes on with the reply that it was begun with here, unless another is queued:

    server.reply(FakeReply("twelve", fail_after=3))
    assert client.stream("p").collect().num_resumes == 1

Owns the replies to give and the requests received. Has no model: a token is one byte of the reply's
UTF-8 (reasoning first), so a client sees half characters as from a real one. Without a reply to
give it repeats the prompt. Log-probabilities are not faked.
"""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NoReturn, Self

import grpc

from rillgate._fake_replies import FakeError as FakeError
from rillgate._fake_replies import FakeReply as FakeReply
from rillgate._fake_replies import FakeRequest as FakeRequest
from rillgate._fake_replies import (
    finished_message,
    num_prompt_tokens,
    output_message,
    reply_tokens,
    started_message,
    to_request,
)
from rillgate._fake_wire import encode_details, handlers, status_response
from rillgate_proto.v1 import control_pb2
from rillgate_proto.v1 import inference_pb2 as pb


class FakeServer:
    """Owns a server, its queue of replies and the requests so far; thread-safe."""

    def __init__(
        self,
        *,
        port: int = 0,
        num_threads: int = 64,
        tokens_per_message: int = 1,
        token_interval_s: float = 0.0,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        """Make a server, which starts with the `with` block; one thread per open stream.

        `port`: 0 takes a free one. `token_interval_s`: of answers that repeat the prompt.
        `credentials`: speak TLS, as grpc.ssl_server_credentials says.
        """
        self.requests: list[FakeRequest] = []
        self.drains: list[control_pb2.DrainRequest] = []
        self._tokens_per_message = tokens_per_message
        self._token_interval_s = token_interval_s
        self._replies: deque[FakeReply | FakeError] = deque()
        self._begun: dict[str, FakeReply] = {}  # request id -> what it was answered with
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
        stopped = self._server.stop(grace=None)
        self.release()
        stopped.wait()

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

    def _take_reply(self, request: FakeRequest, begun_request_id: str) -> FakeReply | FakeError:
        """Record a request and choose its answer."""
        with self._changed:
            self.requests.append(request)
            self._num_prompt_tokens += num_prompt_tokens(request)
            reply: FakeReply | FakeError
            if self._replies:
                reply = self._replies.popleft()
            elif begun_request_id in self._begun:
                reply = self._begun[begun_request_id]
            else:
                last = request.messages[-1].content if request.messages else request.prompt
                text = last if last is not None else "ids"
                reply = FakeReply(text, token_interval_s=self._token_interval_s)
            if isinstance(reply, FakeReply):
                self._begun[reply.request_id] = reply
            return reply

    def answer(
        self, message: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        """Stream the answer to one request."""
        request = to_request(message, context.time_remaining())
        reply = self._take_reply(request, message.continuation.request_id)
        if isinstance(reply, FakeError):
            fail(context, reply)
        begun = started_message(message, request, reply)
        self._count_open(1)
        context.add_callback(self._wake)
        try:
            yield from self._stream(message, request, reply, begun, context)
        finally:
            self._count_open(-1)

    def _stream(
        self,
        message: pb.GenerateRequest,
        request: FakeRequest,
        reply: FakeReply,
        started: pb.Started,
        context: grpc.ServicerContext,
    ) -> Iterator[pb.GenerateResponse]:
        response = pb.GenerateResponse(started=started)
        token_ids, reason = reply_tokens(message, reply)
        given = {choice.index: choice for choice in message.continuation.choices}
        given_lens = {index: len(choice.token_ids) for index, choice in given.items()}
        all_indices = range(message.sampling.n or 1)
        indices = [i for i in all_indices if i not in given or not given[i].finish_reason]
        begin = min((given_lens.get(index, 0) for index in indices), default=len(token_ids))
        for index in set(all_indices) - set(indices):
            end = given_lens[index], given[index].finish_reason
            response.finished.append(finished_message(index, request, reply, end))
        if not self._pause(reply.first_token_delay_s, context):
            return
        if begin == 0 and not self._go_on(reply, -1, 0, context):
            return
        for position in range(begin, len(token_ids), self._tokens_per_message):
            end_position = min(position + self._tokens_per_message, len(token_ids))
            for index in indices:
                span = max(position, given_lens.get(index, 0)), end_position
                if span[0] < span[1]:
                    response.outputs.append(output_message(index, token_ids, span, reply))
            yield response
            response = pb.GenerateResponse()
            if not self._go_on(reply, position, end_position, context):
                return
            if not self._pause(reply.token_interval_s * (end_position - position), context):
                return
        for index in indices:
            end = len(token_ids), reason
            response.finished.append(finished_message(index, request, reply, end))
        yield response
        if indices and reply.fail_after is not None and reply.fail_after > len(token_ids):
            fail(context, reply.error)

    def _go_on(
        self, reply: FakeReply, num_before: int, num_sent: int, context: grpc.ServicerContext
    ) -> bool:
        """Fail or hold as the reply says; False when the caller is gone."""
        if reply.fail_after is not None and num_before < reply.fail_after <= num_sent:
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
