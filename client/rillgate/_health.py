"""grpc.health.v1, as much of it as `wait_ready` needs.

Owns the bytes of one request and the meaning of one answer. Deliberately without
grpcio-health-checking, which the base install does not have.
"""

from google.protobuf.wrappers_pb2 import Int32Value, StringValue

HEALTH_WATCH = "/grpc.health.v1.Health/Watch"

_SERVING = 1


def health_request(service: str) -> bytes:
    """Encode HealthCheckRequest: field 1 is a string, as in StringValue."""
    return StringValue(value=service).SerializeToString()


def is_serving(response: bytes) -> bool:
    """Decode HealthCheckResponse: field 1 is an enum, on the wire an int, as in Int32Value."""
    return Int32Value.FromString(response).value == _SERVING
