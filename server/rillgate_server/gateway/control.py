"""The Control service: what operators ask.

Owns the mapping of a replica's own report to the status message. Does not know requests.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc

from rillgate_proto.v1 import control_pb2 as pb
from rillgate_proto.v1 import control_pb2_grpc
from rillgate_server.core.clock import Clock
from rillgate_server.core.load import EngineLoad
from rillgate_server.core.welcome import Welcome
from rillgate_server.gateway.open_calls import OpenCalls
from rillgate_server.gateway.replica_link import ReplicaLink

_Context = grpc.aio.ServicerContext[Any, Any]


class ControlService(control_pb2_grpc.ControlServicer):
    """The servicer of Control."""

    def __init__(self, link: ReplicaLink, open_calls: OpenCalls, clock: Clock) -> None:
        """Report on the gateway that began now, and on the replica behind `link`."""
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
            replicas=[] if welcome is None else [_replica_status(welcome, self._load())],
        )

    def _load(self) -> EngineLoad | None:
        """Return the replica's latest load; None while it says nothing."""
        return None if self._link.is_lost else self._link.load


def _replica_status(welcome: Welcome, load: EngineLoad | None) -> pb.ReplicaStatus:
    status = pb.ReplicaStatus(
        replica_id=welcome.replica_id,
        incarnation=welcome.incarnation,
        model=welcome.model,
        model_version=welcome.model_version_digest,
        block_size_tokens=welcome.block_size_tokens,
    )
    if load is None:
        return status
    status.state = pb.REPLICA_STATE_DRAINING if load.is_draining else pb.REPLICA_STATE_READY
    status.num_running = load.num_running
    status.num_waiting = load.num_waiting
    status.num_running_tokens = load.num_running_tokens
    status.num_waiting_tokens = load.num_waiting_tokens
    status.step_id = load.step_id
    status.step_age_ms = load.step_age_s * 1000
    status.prefill_tokens_per_s = load.prefill_tokens_per_s
    status.decode_step_ms = load.decode_step_s * 1000
    status.device.num_blocks = load.device.num_blocks
    status.device.num_blocks_free = load.device.num_blocks_free
    status.device.num_blocks_used = load.device.num_blocks_used
    status.device.num_blocks_cached = load.device.num_blocks_cached
    status.num_preemptions = load.num_preemptions
    status.num_cached_tokens = load.num_cached_tokens
    status.num_prompt_tokens = load.num_prompt_tokens
    return status


def _server_version() -> str:
    try:
        return version("rillgate")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
