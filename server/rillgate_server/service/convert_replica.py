"""What a replica says of itself, in engine.proto's messages and core's plain types, both ways.

Owns that mapping alone: Welcome, Load with all that hangs on it, and what a flush dropped. Requests
and their events are convert_engine's, blocks convert_blocks'.
"""

from rillgate_proto.v1 import engine_pb2
from rillgate_server.core.load import (
    CopyCounts,
    DeviceMemory,
    EngineLoad,
    FittedCosts,
    FlushedBlocks,
    LoadDecisions,
    QueueLoad,
    TierLoad,
)
from rillgate_server.core.welcome import Welcome
from rillgate_server.service.convert_engine import PRIORITY_TO_WIRE, priority_from_wire


def welcome_event(welcome: Welcome) -> engine_pb2.ReplicaEvent:
    """Build a replica's first event."""
    return engine_pb2.ReplicaEvent(
        welcome=engine_pb2.Welcome(
            protocol_version=welcome.protocol_version,
            replica_id=welcome.replica_id,
            incarnation=welcome.incarnation,
            model=welcome.model,
            model_version_digest=welcome.model_version_digest,
            tokenizer_digest=welcome.tokenizer_digest,
            vocab_size=welcome.vocab_size,
            max_context_tokens=welcome.max_context_tokens,
            block_size_tokens=welcome.block_size_tokens,
            hash_scheme=welcome.hash_scheme,
            kv_dtype=welcome.kv_dtype,
            tensor_parallel_size=welcome.tensor_parallel_size,
            max_running=welcome.max_running,
        )
    )


def welcome_from_wire(message: engine_pb2.Welcome) -> Welcome:
    """Read a replica's first event."""
    return Welcome(
        replica_id=message.replica_id,
        incarnation=message.incarnation,
        model=message.model,
        model_version_digest=message.model_version_digest,
        tokenizer_digest=message.tokenizer_digest,
        vocab_size=message.vocab_size,
        max_context_tokens=message.max_context_tokens,
        block_size_tokens=message.block_size_tokens,
        hash_scheme=message.hash_scheme,
        kv_dtype=message.kv_dtype,
        max_running=message.max_running,
        tensor_parallel_size=message.tensor_parallel_size,
        protocol_version=message.protocol_version,
    )


def load_event(load: EngineLoad) -> engine_pb2.ReplicaEvent:
    """Build the event that repeats a replica's load."""
    return engine_pb2.ReplicaEvent(
        load=engine_pb2.Load(
            step_id=load.step_id,
            step_age_ms=load.step_age_s * 1e3,
            state=(
                engine_pb2.ENGINE_STATE_DRAINING
                if load.is_draining
                else engine_pb2.ENGINE_STATE_READY
            ),
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_running_tokens=load.num_running_tokens,
            num_waiting_tokens=load.num_waiting_tokens,
            device=_tier_to_wire(load.device),
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            decode_step_ms=load.decode_step_s * 1e3,
            num_preemptions=load.num_preemptions,
            num_cached_tokens=load.num_cached_tokens,
            num_prompt_tokens=load.num_prompt_tokens,
            num_drafted_tokens=load.num_drafted_tokens,
            num_accepted_tokens=load.num_accepted_tokens,
            num_loading=load.num_loading,
            host=_tier_to_wire(load.host),
            copies=_copies_to_wire(load.copies),
            decisions=_decisions_to_wire(load.decisions),
            costs=_costs_to_wire(load.costs),
            queues=map(_queue_to_wire, load.queues),
            free_cpu_fraction=load.free_cpu_fraction,
            free_device_fraction=load.free_device_fraction,
            longest_step_ms=load.longest_step_s * 1e3,
            device_idle_ms_per_step=load.device_idle_s_per_step * 1e3,
            num_following_steps=load.num_following_steps,
            device_memory=_memory_to_wire(load.device_memory),
        )
    )


def load_from_wire(message: engine_pb2.Load) -> EngineLoad:
    """Read a replica's load."""
    return EngineLoad(
        step_id=message.step_id,
        step_age_s=message.step_age_ms / 1e3,
        is_draining=message.state == engine_pb2.ENGINE_STATE_DRAINING,
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        num_running_tokens=message.num_running_tokens,
        num_waiting_tokens=message.num_waiting_tokens,
        device=_tier_from_wire(message.device),
        prefill_tokens_per_s=message.prefill_tokens_per_s,
        decode_step_s=message.decode_step_ms / 1e3,
        num_preemptions=message.num_preemptions,
        num_cached_tokens=message.num_cached_tokens,
        num_prompt_tokens=message.num_prompt_tokens,
        num_drafted_tokens=message.num_drafted_tokens,
        num_accepted_tokens=message.num_accepted_tokens,
        num_loading=message.num_loading,
        host=_tier_from_wire(message.host),
        copies=_copies_from_wire(message.copies),
        decisions=_decisions_from_wire(message.decisions),
        costs=_costs_from_wire(message.costs),
        queues=tuple(map(_queue_from_wire, message.queues)),
        free_cpu_fraction=message.free_cpu_fraction,
        free_device_fraction=message.free_device_fraction,
        longest_step_s=message.longest_step_ms / 1e3,
        device_idle_s_per_step=message.device_idle_ms_per_step / 1e3,
        num_following_steps=message.num_following_steps,
        device_memory=_memory_from_wire(message.device_memory),
    )


def _memory_to_wire(memory: DeviceMemory) -> engine_pb2.DeviceMemory | None:
    if not memory.total_bytes:
        return None
    return engine_pb2.DeviceMemory(
        total_bytes=memory.total_bytes,
        allocated_bytes=memory.allocated_bytes,
        reserved_bytes=memory.reserved_bytes,
        peak_bytes=memory.peak_bytes,
    )


def _memory_from_wire(message: engine_pb2.DeviceMemory) -> DeviceMemory:
    return DeviceMemory(
        message.total_bytes, message.allocated_bytes, message.reserved_bytes, message.peak_bytes
    )


def _tier_to_wire(tier: TierLoad) -> engine_pb2.TierLoad:
    return engine_pb2.TierLoad(
        num_blocks=tier.num_blocks,
        num_blocks_free=tier.num_blocks_free,
        num_blocks_used=tier.num_blocks_used,
        num_blocks_cached=tier.num_blocks_cached,
        num_blocks_copying=tier.num_blocks_copying,
        num_hit_tokens=tier.num_hit_tokens,
        num_evicted_blocks=tier.num_evicted_blocks,
        num_blocks_pageable=tier.num_blocks_pageable,
    )


def _tier_from_wire(message: engine_pb2.TierLoad) -> TierLoad:
    return TierLoad(
        num_blocks=message.num_blocks,
        num_blocks_free=message.num_blocks_free,
        num_blocks_used=message.num_blocks_used,
        num_blocks_cached=message.num_blocks_cached,
        num_blocks_copying=message.num_blocks_copying,
        num_hit_tokens=message.num_hit_tokens,
        num_evicted_blocks=message.num_evicted_blocks,
        num_blocks_pageable=message.num_blocks_pageable,
    )


def _copies_to_wire(copies: CopyCounts) -> engine_pb2.CopyCounts:
    return engine_pb2.CopyCounts(
        num_stored_blocks=copies.num_stored_blocks,
        num_stored_bytes=copies.num_stored_bytes,
        num_loaded_blocks=copies.num_loaded_blocks,
        num_loaded_bytes=copies.num_loaded_bytes,
        num_failed_blocks=copies.num_failed_blocks,
        num_refused_blocks=copies.num_refused_blocks,
        num_unsaved_blocks=copies.num_unsaved_blocks,
    )


def _copies_from_wire(message: engine_pb2.CopyCounts) -> CopyCounts:
    return CopyCounts(
        num_stored_blocks=message.num_stored_blocks,
        num_stored_bytes=message.num_stored_bytes,
        num_loaded_blocks=message.num_loaded_blocks,
        num_loaded_bytes=message.num_loaded_bytes,
        num_failed_blocks=message.num_failed_blocks,
        num_refused_blocks=message.num_refused_blocks,
        num_unsaved_blocks=message.num_unsaved_blocks,
    )


def _decisions_to_wire(decisions: LoadDecisions) -> engine_pb2.LoadDecisions:
    return engine_pb2.LoadDecisions(
        num_loads=decisions.num_loads,
        num_recomputes=decisions.num_recomputes,
        num_loaded_tokens=decisions.num_loaded_tokens,
        num_recomputed_tokens=decisions.num_recomputed_tokens,
        predicted_load_s=decisions.predicted_load_s,
        actual_load_s=decisions.actual_load_s,
        num_swap_preemptions=decisions.num_swap_preemptions,
        num_recompute_preemptions=decisions.num_recompute_preemptions,
    )


def _decisions_from_wire(message: engine_pb2.LoadDecisions) -> LoadDecisions:
    return LoadDecisions(
        num_loads=message.num_loads,
        num_recomputes=message.num_recomputes,
        num_loaded_tokens=message.num_loaded_tokens,
        num_recomputed_tokens=message.num_recomputed_tokens,
        predicted_load_s=message.predicted_load_s,
        actual_load_s=message.actual_load_s,
        num_swap_preemptions=message.num_swap_preemptions,
        num_recompute_preemptions=message.num_recompute_preemptions,
    )


def _costs_to_wire(costs: FittedCosts) -> engine_pb2.FittedCosts:
    return engine_pb2.FittedCosts(
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


def _costs_from_wire(message: engine_pb2.FittedCosts) -> FittedCosts:
    return FittedCosts(
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


def _queue_to_wire(queue: QueueLoad) -> engine_pb2.QueueLoad:
    return engine_pb2.QueueLoad(
        priority_class=PRIORITY_TO_WIRE[queue.priority],
        tenant=queue.tenant,
        num_requests=queue.num_requests,
        num_tokens=queue.num_tokens,
    )


def _queue_from_wire(message: engine_pb2.QueueLoad) -> QueueLoad:
    return QueueLoad(
        priority=priority_from_wire(message.priority_class),
        tenant=message.tenant,
        num_requests=message.num_requests,
        num_tokens=message.num_tokens,
    )


def flushed_to_wire(flushed: FlushedBlocks) -> engine_pb2.EngineFlushCacheResponse:
    """Build the answer to FlushCache."""
    return engine_pb2.EngineFlushCacheResponse(
        num_device_blocks=flushed.num_device_blocks, num_host_blocks=flushed.num_host_blocks
    )


def flushed_from_wire(message: engine_pb2.EngineFlushCacheResponse) -> FlushedBlocks:
    """Read the answer to FlushCache."""
    return FlushedBlocks(message.num_device_blocks, message.num_host_blocks)
