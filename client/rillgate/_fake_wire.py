"""The fake server's side of the wire: method handlers and the bytes of error details.

Owns the wiring of `testing.FakeServer`. Knows nothing of replies.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

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
from rillgate.errors import FieldViolation
from rillgate_proto.v1 import control_pb2
from rillgate_proto.v1 import inference_pb2 as pb

# gRPC's annotations bind a handler's types to nothing, and the handlers of one service differ.
_Handlers: TypeAlias = "dict[str, grpc.RpcMethodHandler[Any, Any]]"

MODEL = "fake"
MODEL_VERSION = "fake-version"
MAX_CONTEXT_TOKENS = 4096


class Answers(Protocol):
    """What the handlers ask the fake server."""

    def answer(
        self, message: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        """Stream the answer to one request."""

    def health(self, context: grpc.ServicerContext) -> Iterator[bool]:
        """Tell whether it is ready, and again at every change."""

    def status(self) -> control_pb2.GetStatusResponse:
        """Tell what is open."""

    def flush_cache(self) -> control_pb2.FlushCacheResponse:
        """Forget what is cached."""

    def drain(self, message: control_pb2.DrainRequest) -> control_pb2.DrainResponse:
        """Take no more generations on."""


def handlers(answers: Answers) -> list[grpc.GenericRpcHandler]:
    """Make the handlers of every method."""
    inference: _Handlers = {
        "Generate": _streaming(GENERATE, answers.answer),
        "Complete": _unary(
            COMPLETE, lambda message, context: _whole(answers.answer(message.request, context))
        ),
        "Tokenize": _unary(TOKENIZE, lambda message, _: _tokenize(message)),
        "Detokenize": _unary(DETOKENIZE, lambda message, _: _detokenize(message)),
        "ListModels": _unary(LIST_MODELS, lambda _, __: _models()),
    }
    control: _Handlers = {
        "GetStatus": _unary(GET_STATUS, lambda _, __: answers.status()),
        "FlushCache": _unary(FLUSH_CACHE, lambda _, __: answers.flush_cache()),
        "Drain": _unary(DRAIN, lambda message, _: answers.drain(message)),
    }
    health: _Handlers = {
        "Watch": grpc.unary_stream_rpc_method_handler(
            lambda _, context: answers.health(context),
            lambda data: StringValue.FromString(data).value,
            _health_response,
        )
    }
    return [
        grpc.method_handlers_generic_handler("rillgate.v1.Inference", inference),
        grpc.method_handlers_generic_handler("rillgate.v1.Control", control),
        grpc.method_handlers_generic_handler("grpc.health.v1.Health", health),
    ]


def _health_response(is_ready: bool) -> bytes:
    """Encode HealthCheckResponse: field 1 is an enum, SERVING is 1 and NOT_SERVING is 2."""
    return Int32Value(value=1 if is_ready else 2).SerializeToString()


def _unary(
    method: Method[RequestT, ResponseT],
    behavior: Callable[[RequestT, grpc.ServicerContext], ResponseT],
) -> "grpc.RpcMethodHandler[RequestT, ResponseT]":
    return grpc.unary_unary_rpc_method_handler(
        behavior, method.request.FromString, lambda response: response.SerializeToString()
    )


def _streaming(
    method: Method[RequestT, ResponseT],
    behavior: Callable[[RequestT, grpc.ServicerContext], Iterator[ResponseT]],
) -> "grpc.RpcMethodHandler[RequestT, ResponseT]":
    return grpc.unary_stream_rpc_method_handler(
        behavior, method.request.FromString, lambda response: response.SerializeToString()
    )


def _whole(stream: Iterator[pb.GenerateResponse]) -> pb.CompleteResponse:
    """Add the messages of a stream up to one answer."""
    whole = pb.CompleteResponse()
    choices: dict[int, pb.Choice] = {}
    for response in stream:
        if response.HasField("started"):
            whole.started.CopyFrom(response.started)
        for output in response.outputs:
            choice = choices.setdefault(output.choice_index, pb.Choice(index=output.choice_index))
            choice.text += output.text
            choice.reasoning_text += output.reasoning_text
            choice.token_ids.extend(output.token_ids)
        for finished in response.finished:
            index = finished.choice_index
            choices.setdefault(index, pb.Choice(index=index)).finished.CopyFrom(finished)
    whole.choices.extend(choices[index] for index in sorted(choices))
    return whole


def _tokenize(message: pb.TokenizeRequest) -> pb.TokenizeResponse:
    texts = [message.prompt, *(entry.content for entry in message.chat.messages)]
    return pb.TokenizeResponse(
        token_ids="".join(texts).encode(), max_context_tokens=MAX_CONTEXT_TOKENS
    )


def _detokenize(message: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
    data = bytes(token_id for token_id in message.token_ids if token_id < 256)
    return pb.DetokenizeResponse(text=data.decode("utf-8", "replace"))


def _models() -> pb.ListModelsResponse:
    model = pb.Model(
        name=MODEL,
        version=MODEL_VERSION,
        max_context_tokens=MAX_CONTEXT_TOKENS,
        vocab_size=256,
        eos_token_ids=[0],
        has_chat_template=True,
    )
    return pb.ListModelsResponse(models=[model])


def status_response(
    num_open: int, num_cached_blocks: int, num_prompt_tokens: int
) -> control_pb2.GetStatusResponse:
    """Describe one replica with a block per open generation."""
    device = control_pb2.TierStatus(
        num_blocks=100,
        num_blocks_free=100 - num_cached_blocks - num_open,
        num_blocks_used=num_open,
        num_blocks_cached=num_cached_blocks,
    )
    host = control_pb2.TierStatus(
        num_blocks=200,
        num_blocks_free=200 - num_cached_blocks,
        num_blocks_cached=num_cached_blocks,
    )
    replica = control_pb2.ReplicaStatus(
        replica_id="replica-0",
        model=MODEL,
        model_version=MODEL_VERSION,
        state=control_pb2.REPLICA_STATE_READY,
        num_running=num_open,
        device=device,
        host=host,
        block_size_tokens=16,
        num_prompt_tokens=num_prompt_tokens,
    )
    return control_pb2.GetStatusResponse(
        server_version="fake", num_open_requests=num_open, replicas=[replica]
    )


# -- google.rpc.Status, written; _status_details reads it -----------------------------------------


def encode_details(
    code: grpc.StatusCode,
    message: str,
    violations: tuple[FieldViolation, ...],
    retry_after_s: float | None,
    request_id: str,
) -> bytes:
    """Write google.rpc.Status with the details that are there."""
    details = []
    if violations:
        parts = [
            _field(1, _text(1, violation.field) + _text(2, violation.description))
            for violation in violations
        ]
        details.append(("BadRequest", b"".join(parts)))
    if retry_after_s is not None:
        delay = Duration()
        delay.FromMicroseconds(round(retry_after_s * 1e6))
        details.append(("RetryInfo", _field(1, delay.SerializeToString())))
    if request_id:
        details.append(("RequestInfo", _text(1, request_id)))
    number: int = code.value[0]
    status = Int32Value(value=number).SerializeToString() + _text(2, message)
    for name, value in details:
        packed = AnyMessage(type_url=f"type.googleapis.com/google.rpc.{name}", value=value)
        status += _field(3, packed.SerializeToString())
    return status


def _text(number: int, text: str) -> bytes:
    return _field(number, text.encode())


def _field(number: int, data: bytes) -> bytes:
    """Write a length-delimited field: its number with wire type 2, the length, the bytes."""
    length = bytearray()
    rest = len(data)
    while rest >= 0x80:
        length.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([number << 3 | 2, *length, rest]) + data
