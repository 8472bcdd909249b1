"""From the answers of Control to the client's plain values.

Owns the translation of the status and of what a flush dropped; the answers of Inference are
`_convert_response`'s.
"""

from rillgate.status_types import (
    CopyStatus,
    CostStatus,
    DecisionStatus,
    DeviceMemoryStatus,
    FlushedCache,
    QueueStatus,
    ReplicaState,
    ReplicaStatus,
    ServerStatus,
    TierStatus,
)
from rillgate.types import Priority
from rillgate_proto.v1 import control_pb2, inference_pb2

_STATES = {
    int(control_pb2.REPLICA_STATE_READY): ReplicaState.READY,
    int(control_pb2.REPLICA_STATE_DRAINING): ReplicaState.DRAINING,
    int(control_pb2.REPLICA_STATE_FROZEN): ReplicaState.FROZEN,
}
_PRIORITIES = {
    int(inference_pb2.PRIORITY_HIGH): Priority.HIGH,
    int(inference_pb2.PRIORITY_LOW): Priority.LOW,
}


def to_status(message: control_pb2.GetStatusResponse) -> ServerStatus:
    """Translate."""
    return ServerStatus(
        server_version=message.server_version,
        uptime_s=message.uptime_s,
        num_open_requests=message.num_open_requests,
        replicas=tuple(map(_to_replica, message.replicas)),
        routing_policy=message.routing_policy,
        num_moved_streams=message.num_moved_streams,
        num_waiting_streams=message.num_waiting_streams,
    )


def _to_replica(message: control_pb2.ReplicaStatus) -> ReplicaStatus:
    return ReplicaStatus(
        replica_id=message.replica_id,
        incarnation=message.incarnation,
        model=message.model,
        model_version=message.model_version,
        state=_STATES.get(int(message.state), ReplicaState.NOT_CONNECTED),
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        num_running_tokens=message.num_running_tokens,
        num_waiting_tokens=message.num_waiting_tokens,
        step_id=message.step_id,
        step_age_ms=message.step_age_ms,
        prefill_tokens_per_s=message.prefill_tokens_per_s,
        decode_step_ms=message.decode_step_ms,
        device=_to_tier(message.device),
        block_size_tokens=message.block_size_tokens,
        num_preemptions=message.num_preemptions,
        num_cached_tokens=message.num_cached_tokens,
        num_prompt_tokens=message.num_prompt_tokens,
        num_loading=message.num_loading,
        host=_to_tier(message.host),
        copies=_to_copies(message.copies),
        decisions=_to_decisions(message.decisions),
        costs=_to_costs(message.costs),
        queues=tuple(map(_to_queue, message.queues)),
        address=message.address,
        set_aside=message.set_aside,
        tensor_parallel_size=message.tensor_parallel_size,
        num_streams=message.num_streams,
        num_announced_blocks=message.num_announced_blocks,
        num_drafted_tokens=message.num_drafted_tokens,
        num_accepted_tokens=message.num_accepted_tokens,
        device_idle_ms_per_step=message.device_idle_ms_per_step,
        num_following_steps=message.num_following_steps,
        device_memory=(
            _to_memory(message.device_memory) if message.HasField("device_memory") else None
        ),
    )


def _to_memory(message: control_pb2.DeviceMemoryStatus) -> DeviceMemoryStatus:
    return DeviceMemoryStatus(
        total_bytes=message.total_bytes,
        allocated_bytes=message.allocated_bytes,
        reserved_bytes=message.reserved_bytes,
        peak_bytes=message.peak_bytes,
    )


def _to_tier(message: control_pb2.TierStatus) -> TierStatus:
    return TierStatus(
        num_blocks=message.num_blocks,
        num_blocks_free=message.num_blocks_free,
        num_blocks_used=message.num_blocks_used,
        num_blocks_cached=message.num_blocks_cached,
        num_blocks_copying=message.num_blocks_copying,
        num_hit_tokens=message.num_hit_tokens,
        num_evicted_blocks=message.num_evicted_blocks,
        num_blocks_pageable=message.num_blocks_pageable,
    )


def _to_copies(message: control_pb2.CopyStatus) -> CopyStatus:
    return CopyStatus(
        num_stored_blocks=message.num_stored_blocks,
        num_stored_bytes=message.num_stored_bytes,
        num_loaded_blocks=message.num_loaded_blocks,
        num_loaded_bytes=message.num_loaded_bytes,
        num_failed_blocks=message.num_failed_blocks,
        num_refused_blocks=message.num_refused_blocks,
        num_unsaved_blocks=message.num_unsaved_blocks,
    )


def _to_decisions(message: control_pb2.DecisionStatus) -> DecisionStatus:
    return DecisionStatus(
        num_loads=message.num_loads,
        num_recomputes=message.num_recomputes,
        num_loaded_tokens=message.num_loaded_tokens,
        num_recomputed_tokens=message.num_recomputed_tokens,
        predicted_load_s=message.predicted_load_s,
        actual_load_s=message.actual_load_s,
        num_swap_preemptions=message.num_swap_preemptions,
        num_recompute_preemptions=message.num_recompute_preemptions,
    )


def _to_costs(message: control_pb2.CostStatus) -> CostStatus:
    return CostStatus(
        step_s=message.step_s,
        prefill_token_s=message.prefill_token_s,
        prefill_context_s=message.prefill_context_s,
        decode_row_s=message.decode_row_s,
        decode_context_s=message.decode_context_s,
        load_latency_s=message.load_latency_s,
        load_bytes_per_s=message.load_bytes_per_s,
        store_latency_s=message.store_latency_s,
        store_bytes_per_s=message.store_bytes_per_s,
    )


def _to_queue(message: control_pb2.QueueStatus) -> QueueStatus:
    return QueueStatus(
        priority=_PRIORITIES.get(int(message.priority), Priority.NORMAL),
        tenant=message.tenant,
        num_requests=message.num_requests,
        num_tokens=message.num_tokens,
    )


def to_flushed(message: control_pb2.FlushCacheResponse) -> FlushedCache:
    """Translate."""
    return FlushedCache(message.num_replicas, message.num_device_blocks, message.num_host_blocks)
