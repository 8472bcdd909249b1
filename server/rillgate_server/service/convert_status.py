"""A replica's report in control.proto's messages, for operators.

Owns that mapping alone. What a replica does not say (it is silent, or has no host tier) stays 0.
"""

from rillgate_proto.v1 import control_pb2 as pb
from rillgate_proto.v1 import inference_pb2
from rillgate_server.core.load import (
    CopyCounts,
    DeviceMemory,
    EngineLoad,
    FittedCosts,
    LoadDecisions,
    QueueLoad,
    TierLoad,
)
from rillgate_server.core.request import PriorityClass
from rillgate_server.core.welcome import Welcome

_PRIORITY_TO_WIRE = {
    PriorityClass.HIGH: inference_pb2.PRIORITY_HIGH,
    PriorityClass.NORMAL: inference_pb2.PRIORITY_NORMAL,
    PriorityClass.LOW: inference_pb2.PRIORITY_LOW,
}


def replica_status(welcome: Welcome, load: EngineLoad | None) -> pb.ReplicaStatus:
    """Build a replica's entry; without a load it is not connected.

    What the gateway alone knows of it (address, streams, announced blocks) is the caller's to add.
    """
    status = pb.ReplicaStatus(
        replica_id=welcome.replica_id,
        incarnation=welcome.incarnation,
        model=welcome.model,
        model_version=welcome.model_version_digest,
        block_size_tokens=welcome.block_size_tokens,
        tensor_parallel_size=welcome.tensor_parallel_size,
    )
    if load is not None:
        status.MergeFrom(_load(load))
    return status


def _memory(memory: DeviceMemory) -> pb.DeviceMemoryStatus | None:
    if not memory.total_bytes:
        return None
    return pb.DeviceMemoryStatus(
        total_bytes=memory.total_bytes,
        allocated_bytes=memory.allocated_bytes,
        reserved_bytes=memory.reserved_bytes,
        peak_bytes=memory.peak_bytes,
    )


def _load(load: EngineLoad) -> pb.ReplicaStatus:
    """Return the fields that a load fills."""
    return pb.ReplicaStatus(
        state=pb.REPLICA_STATE_DRAINING if load.is_draining else pb.REPLICA_STATE_READY,
        num_running=load.num_running,
        num_loading=load.num_loading,
        num_waiting=load.num_waiting,
        num_running_tokens=load.num_running_tokens,
        num_waiting_tokens=load.num_waiting_tokens,
        step_id=load.step_id,
        step_age_ms=load.step_age_s * 1000,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        decode_step_ms=load.decode_step_s * 1000,
        num_preemptions=load.num_preemptions,
        num_cached_tokens=load.num_cached_tokens,
        num_prompt_tokens=load.num_prompt_tokens,
        num_drafted_tokens=load.num_drafted_tokens,
        num_accepted_tokens=load.num_accepted_tokens,
        device_idle_ms_per_step=load.device_idle_s_per_step * 1000,
        num_following_steps=load.num_following_steps,
        device_memory=_memory(load.device_memory),
        device=_tier(load.device),
        host=_tier(load.host),
        copies=_copies(load.copies),
        decisions=_decisions(load.decisions),
        costs=_costs(load.costs),
        queues=map(_queue, load.queues),
    )


def _tier(tier: TierLoad) -> pb.TierStatus:
    return pb.TierStatus(
        num_blocks=tier.num_blocks,
        num_blocks_free=tier.num_blocks_free,
        num_blocks_used=tier.num_blocks_used,
        num_blocks_cached=tier.num_blocks_cached,
        num_blocks_copying=tier.num_blocks_copying,
        num_hit_tokens=tier.num_hit_tokens,
        num_evicted_blocks=tier.num_evicted_blocks,
        num_blocks_pageable=tier.num_blocks_pageable,
    )


def _copies(copies: CopyCounts) -> pb.CopyStatus:
    return pb.CopyStatus(
        num_stored_blocks=copies.num_stored_blocks,
        num_stored_bytes=copies.num_stored_bytes,
        num_loaded_blocks=copies.num_loaded_blocks,
        num_loaded_bytes=copies.num_loaded_bytes,
        num_failed_blocks=copies.num_failed_blocks,
        num_refused_blocks=copies.num_refused_blocks,
        num_unsaved_blocks=copies.num_unsaved_blocks,
    )


def _decisions(decisions: LoadDecisions) -> pb.DecisionStatus:
    return pb.DecisionStatus(
        num_loads=decisions.num_loads,
        num_recomputes=decisions.num_recomputes,
        num_loaded_tokens=decisions.num_loaded_tokens,
        num_recomputed_tokens=decisions.num_recomputed_tokens,
        predicted_load_s=decisions.predicted_load_s,
        actual_load_s=decisions.actual_load_s,
        num_swap_preemptions=decisions.num_swap_preemptions,
        num_recompute_preemptions=decisions.num_recompute_preemptions,
    )


def _costs(costs: FittedCosts) -> pb.CostStatus:
    return pb.CostStatus(
        step_s=costs.step_s,
        prefill_token_s=costs.prefill_token_s,
        prefill_context_s=costs.prefill_context_s,
        decode_row_s=costs.decode_row_s,
        decode_context_s=costs.decode_context_s,
        load_latency_s=costs.load_latency_s,
        load_bytes_per_s=costs.load_bytes_per_s,
        store_latency_s=costs.store_latency_s,
        store_bytes_per_s=costs.store_bytes_per_s,
    )


def _queue(queue: QueueLoad) -> pb.QueueStatus:
    return pb.QueueStatus(
        priority=_PRIORITY_TO_WIRE[queue.priority],
        tenant=queue.tenant,
        num_requests=queue.num_requests,
        num_tokens=queue.num_tokens,
    )
