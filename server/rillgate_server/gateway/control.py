"""The Control service: what operators ask and order.

Owns the answers for the replicas behind this gateway; how a report reads as a message is
convert_status's. Does not know requests.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from rillgate_proto.v1 import control_pb2 as pb
from rillgate_proto.v1 import control_pb2_grpc
from rillgate_server.config.groups import GatewayConfig
from rillgate_server.core.clock import Clock
from rillgate_server.core.model_spec import ModelSpec
from rillgate_server.core.release import release_of
from rillgate_server.errors import InvalidRequest
from rillgate_server.gateway.fleet import Fleet, ReplicaReport
from rillgate_server.gateway.open_calls import OpenCalls
from rillgate_server.service.convert_public import check_model
from rillgate_server.service.convert_status import replica_status

MAX_REPLICA_ID_BYTES = 256
MAX_DRAIN_MS = 86_400_000

_Context = grpc.aio.ServicerContext[Any, Any]


class ControlService(control_pb2_grpc.ControlServicer):
    """The servicer of Control."""

    def __init__(
        self,
        spec: ModelSpec,
        fleet: Fleet,
        open_calls: OpenCalls,
        drain: Callable[[float], Awaitable[None]],
        clock: Clock,
        config: GatewayConfig,
    ) -> None:
        """Report on the gateway that began now, and on the replicas of `spec` in `fleet`.

        `drain` takes the whole gateway out of service and waits at most so many seconds.
        """
        self._spec = spec
        self._fleet = fleet
        self._open_calls = open_calls
        self._drain = drain
        self._clock = clock
        self._config = config
        self._began_s = clock.now()

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: _Context
    ) -> pb.GetStatusResponse:
        """Tell what the server and its replicas are doing now."""
        return pb.GetStatusResponse(
            server_version=release_of("rillgate"),
            uptime_s=self._clock.now() - self._began_s,
            num_open_requests=self._open_calls.num_open,
            replicas=map(_status, self._fleet.reports()),
            routing_policy=self._config.routing_policy,
            num_moved_streams=self._fleet.num_moved_streams,
            num_waiting_streams=self._fleet.num_waiting_streams,
        )

    async def FlushCache(
        self, request: pb.FlushCacheRequest, context: _Context
    ) -> pb.FlushCacheResponse:
        """Let the replicas forget what they cached and no request uses; raises NoReplica."""
        check_model(request.model, self._spec)
        num_replicas, flushed = await self._fleet.flush_cache()
        return pb.FlushCacheResponse(
            num_replicas=num_replicas,
            num_device_blocks=flushed.num_device_blocks,
            num_host_blocks=flushed.num_host_blocks,
        )

    async def Drain(self, request: pb.DrainRequest, context: _Context) -> pb.DrainResponse:
        """Take a replica or the whole server out of service; wait for what runs."""
        if len(request.replica_id.encode()) > MAX_REPLICA_ID_BYTES:
            raise InvalidRequest.of(
                "replica_id", request.replica_id, f"at most {MAX_REPLICA_ID_BYTES} bytes"
            )
        if request.time_limit_ms > MAX_DRAIN_MS:
            raise InvalidRequest.of(
                "time_limit_ms", request.time_limit_ms, f"at most {MAX_DRAIN_MS}"
            )
        limit_s = request.time_limit_ms / 1000 or self._config.drain_grace_s
        if request.replica_id:
            num_open = await self._fleet.drain(request.replica_id, limit_s, undo=request.undo)
            return pb.DrainResponse(num_open_requests=num_open)
        if request.undo:
            raise InvalidRequest.of(
                "undo", "true", "false for the whole server: start it again instead"
            )
        await self._drain(limit_s)
        return pb.DrainResponse(num_open_requests=self._open_calls.num_open)


def _status(report: ReplicaReport) -> pb.ReplicaStatus:
    """Build a replica's entry; one that never answered has an address and little else."""
    status = pb.ReplicaStatus()
    if report.welcome is not None:
        status = replica_status(report.welcome, report.load)
    status.address = report.address
    status.set_aside = report.set_aside
    status.num_streams = report.num_streams
    status.num_announced_blocks = report.num_announced_blocks
    if report.is_frozen:
        status.state = pb.REPLICA_STATE_FROZEN
    return status
