"""The calls of the protocol, by path, for either kind of channel.

Owns the paths and their types. Deliberately not the generated stub classes: those carry no types.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from rillgate_proto.v1 import control_pb2, inference_pb2

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)


@dataclass(frozen=True, slots=True)
class Method(Generic[RequestT, ResponseT]):
    """One call: its path, and the messages that go and come."""

    path: str
    request: type[RequestT]
    response: type[ResponseT]

    def serialize(self, request: RequestT) -> bytes:
        """Turn the request into bytes, as gRPC wants it done."""
        return request.SerializeToString()

    def deserialize(self, data: bytes) -> ResponseT:
        """Turn an answer's bytes into the message."""
        return self.response.FromString(data)


GENERATE = Method(
    "/rillgate.v1.Inference/Generate",
    inference_pb2.GenerateRequest,
    inference_pb2.GenerateResponse,
)
COMPLETE = Method(
    "/rillgate.v1.Inference/Complete",
    inference_pb2.CompleteRequest,
    inference_pb2.CompleteResponse,
)
TOKENIZE = Method(
    "/rillgate.v1.Inference/Tokenize",
    inference_pb2.TokenizeRequest,
    inference_pb2.TokenizeResponse,
)
DETOKENIZE = Method(
    "/rillgate.v1.Inference/Detokenize",
    inference_pb2.DetokenizeRequest,
    inference_pb2.DetokenizeResponse,
)
LIST_MODELS = Method(
    "/rillgate.v1.Inference/ListModels",
    inference_pb2.ListModelsRequest,
    inference_pb2.ListModelsResponse,
)
FLUSH_CACHE = Method(
    "/rillgate.v1.Control/FlushCache",
    control_pb2.FlushCacheRequest,
    control_pb2.FlushCacheResponse,
)
DRAIN = Method(
    "/rillgate.v1.Control/Drain",
    control_pb2.DrainRequest,
    control_pb2.DrainResponse,
)
GET_STATUS = Method(
    "/rillgate.v1.Control/GetStatus",
    control_pb2.GetStatusRequest,
    control_pb2.GetStatusResponse,
)
