"""A replica's report reaches operators whole: from core's load to the client's plain values."""

from dataclasses import asdict, replace

from hypothesis import given, settings

from rillgate._convert_status import to_status
from rillgate.status_types import ReplicaState, ReplicaStatus
from rillgate_proto.v1 import control_pb2 as pb
from rillgate_server.core.load import EngineLoad
from rillgate_server.service.convert_status import replica_status
from tests.replica.engine_server import WELCOME
from tests.service.engine_loads import engine_loads


def as_seen(load: EngineLoad | None) -> ReplicaStatus:
    """Send a load through both conversions and the wire between them."""
    message = pb.GetStatusResponse(replicas=[replica_status(WELCOME, load)])
    status = to_status(pb.GetStatusResponse.FromString(message.SerializeToString()))
    return status.replicas[0]


@settings(deadline=None)
@given(engine_loads)
def test_every_number_of_a_load_reaches_the_client(load: EngineLoad) -> None:
    """Under the same names, each tier's, copy's, decision's and cost's own; the queues in order."""
    seen, given_load = asdict(as_seen(load)), asdict(load)
    if not load.device_memory.total_bytes:
        given_load["device_memory"] = None
    for queue in (*seen["queues"], *given_load["queues"]):
        queue["priority"] = queue["priority"].name
    same = seen.keys() & given_load.keys()
    assert {name: seen[name] for name in same} == {name: given_load[name] for name in same}
    for_gateways = {"free_cpu_fraction", "free_device_fraction", "longest_step_s"}
    assert given_load.keys() - same == {
        "step_age_s",
        "is_draining",
        "decode_step_s",
        "device_idle_s_per_step",
        *for_gateways,
    }
    assert seen["step_age_ms"] == load.step_age_s * 1000
    assert seen["decode_step_ms"] == load.decode_step_s * 1000
    assert seen["device_idle_ms_per_step"] == load.device_idle_s_per_step * 1000
    state = ReplicaState.DRAINING if load.is_draining else ReplicaState.READY
    assert seen["state"] is state


def test_a_silent_replica_is_named_and_not_connected() -> None:
    """What it is stays known; what it does is not made up."""
    seen = as_seen(None)
    assert (seen.replica_id, seen.state) == (WELCOME.replica_id, ReplicaState.NOT_CONNECTED)
    assert seen.device.num_blocks == 0


def test_the_ranks_of_a_replica_are_known_without_a_load() -> None:
    """They are what it is, not what it does."""
    message = replica_status(replace(WELCOME, tensor_parallel_size=4), None)
    status = to_status(pb.GetStatusResponse(replicas=[message]))
    assert status.replicas[0].tensor_parallel_size == 4
