"""The Control service: what operators ask and order.

Owns the answers for the one replica behind this gateway; how its report reads as a message is
convert_status's. Does not know requests.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc

from rillgate_proto.v1 import control_pb2 as pb
from rillgate_proto.v1 import control_pb2_grpc
from rillgate_server.core.clock import Clock
from rillgate_server.core.load import EngineLoad
from rillgate_server.core.model_spec import ModelSpec
from rillgate_server.gateway.open_calls import OpenCalls
from rillgate_server.gateway.replica_link import ReplicaLink
from rillgate_server.service.convert_public import check_model
from rillgate_server.service.convert_status import replica_status

_Context = grpc.aio.ServicerContext[Any, Any]


class ControlService(control_pb2_grpc.ControlServicer):
    """The servicer of Control."""

    def __init__(
        self, spec: ModelSpec, link: ReplicaLink, open_calls: OpenCalls, clock: Clock
    ) -> None:
        """Report on the gateway that began now, and on the replica of `spec` behind `link`."""
        self._spec = spec
        self._link = link
        self._open_calls = open_calls
        self._clock = clock
        self._began_s = clock.now()

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: _Context
    ) -> pb.GetStatusResponse:
        """Tell what the server and its replica are doing now."""
        welcome = self._link.welcome
        return pb.GetStatusResponse(
            server_version=_server_version(),
            uptime_s=self._clock.now() - self._began_s,
            num_open_requests=self._open_calls.num_open,
            replicas=[] if welcome is None else [replica_status(welcome, self._load())],
        )

    async def FlushCache(
        self, request: pb.FlushCacheRequest, context: _Context
    ) -> pb.FlushCacheResponse:
        """Let the replica forget what it cached and no request uses; raises NoReplica."""
        check_model(request.model, self._spec)
        flushed = await self._link.flush_cache()
        return pb.FlushCacheResponse(
            num_replicas=1,
            num_device_blocks=flushed.num_device_blocks,
            num_host_blocks=flushed.num_host_blocks,
        )

    def _load(self) -> EngineLoad | None:
        """Return the replica's latest load; None while it says nothing."""
        return None if self._link.is_lost else self._link.load


def _server_version() -> str:
    try:
        return version("rillgate")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
