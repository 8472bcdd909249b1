from rillgate_proto.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATE_UNSPECIFIED: _ClassVar[ReplicaState]
    REPLICA_STATE_READY: _ClassVar[ReplicaState]
    REPLICA_STATE_DRAINING: _ClassVar[ReplicaState]
    REPLICA_STATE_FROZEN: _ClassVar[ReplicaState]
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_READY: ReplicaState
REPLICA_STATE_DRAINING: ReplicaState
REPLICA_STATE_FROZEN: ReplicaState

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("server_version", "uptime_s", "num_open_requests", "replicas", "routing_policy", "num_moved_streams", "num_waiting_streams")
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    NUM_OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    ROUTING_POLICY_FIELD_NUMBER: _ClassVar[int]
    NUM_MOVED_STREAMS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_STREAMS_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    uptime_s: float
    num_open_requests: int
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaStatus]
    routing_policy: str
    num_moved_streams: int
    num_waiting_streams: int
    def __init__(self, server_version: _Optional[str] = ..., uptime_s: _Optional[float] = ..., num_open_requests: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[ReplicaStatus, _Mapping]]] = ..., routing_policy: _Optional[str] = ..., num_moved_streams: _Optional[int] = ..., num_waiting_streams: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("replica_id", "time_limit_ms", "undo")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    TIME_LIMIT_MS_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    time_limit_ms: int
    undo: bool
    def __init__(self, replica_id: _Optional[str] = ..., time_limit_ms: _Optional[int] = ..., undo: bool = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("num_open_requests",)
    NUM_OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    num_open_requests: int
    def __init__(self, num_open_requests: _Optional[int] = ...) -> None: ...

class FlushCacheRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class FlushCacheResponse(_message.Message):
    __slots__ = ("num_replicas", "num_device_blocks", "num_host_blocks")
    NUM_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    NUM_DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_replicas: int
    num_device_blocks: int
    num_host_blocks: int
    def __init__(self, num_replicas: _Optional[int] = ..., num_device_blocks: _Optional[int] = ..., num_host_blocks: _Optional[int] = ...) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("replica_id", "incarnation", "model", "model_version", "state", "num_running", "num_waiting", "num_running_tokens", "num_waiting_tokens", "step_id", "step_age_ms", "prefill_tokens_per_s", "decode_step_ms", "device", "block_size_tokens", "num_preemptions", "num_cached_tokens", "num_prompt_tokens", "num_loading", "host", "copies", "decisions", "costs", "queues", "address", "set_aside", "tensor_parallel_size", "num_streams", "num_announced_blocks", "num_drafted_tokens", "num_accepted_tokens", "device_idle_ms_per_step", "num_following_steps", "device_memory")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEP_MS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOADING_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    QUEUES_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SET_ASIDE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_STREAMS_FIELD_NUMBER: _ClassVar[int]
    NUM_ANNOUNCED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_IDLE_MS_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_FOLLOWING_STEPS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MEMORY_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    incarnation: int
    model: str
    model_version: str
    state: ReplicaState
    num_running: int
    num_waiting: int
    num_running_tokens: int
    num_waiting_tokens: int
    step_id: int
    step_age_ms: float
    prefill_tokens_per_s: float
    decode_step_ms: float
    device: TierStatus
    block_size_tokens: int
    num_preemptions: int
    num_cached_tokens: int
    num_prompt_tokens: int
    num_loading: int
    host: TierStatus
    copies: CopyStatus
    decisions: DecisionStatus
    costs: CostStatus
    queues: _containers.RepeatedCompositeFieldContainer[QueueStatus]
    address: str
    set_aside: str
    tensor_parallel_size: int
    num_streams: int
    num_announced_blocks: int
    num_drafted_tokens: int
    num_accepted_tokens: int
    device_idle_ms_per_step: float
    num_following_steps: int
    device_memory: DeviceMemoryStatus
    def __init__(self, replica_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., model: _Optional[str] = ..., model_version: _Optional[str] = ..., state: _Optional[_Union[ReplicaState, str]] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_running_tokens: _Optional[int] = ..., num_waiting_tokens: _Optional[int] = ..., step_id: _Optional[int] = ..., step_age_ms: _Optional[float] = ..., prefill_tokens_per_s: _Optional[float] = ..., decode_step_ms: _Optional[float] = ..., device: _Optional[_Union[TierStatus, _Mapping]] = ..., block_size_tokens: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., num_loading: _Optional[int] = ..., host: _Optional[_Union[TierStatus, _Mapping]] = ..., copies: _Optional[_Union[CopyStatus, _Mapping]] = ..., decisions: _Optional[_Union[DecisionStatus, _Mapping]] = ..., costs: _Optional[_Union[CostStatus, _Mapping]] = ..., queues: _Optional[_Iterable[_Union[QueueStatus, _Mapping]]] = ..., address: _Optional[str] = ..., set_aside: _Optional[str] = ..., tensor_parallel_size: _Optional[int] = ..., num_streams: _Optional[int] = ..., num_announced_blocks: _Optional[int] = ..., num_drafted_tokens: _Optional[int] = ..., num_accepted_tokens: _Optional[int] = ..., device_idle_ms_per_step: _Optional[float] = ..., num_following_steps: _Optional[int] = ..., device_memory: _Optional[_Union[DeviceMemoryStatus, _Mapping]] = ...) -> None: ...

class DeviceMemoryStatus(_message.Message):
    __slots__ = ("total_bytes", "allocated_bytes", "reserved_bytes", "peak_bytes")
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    ALLOCATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    total_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    peak_bytes: int
    def __init__(self, total_bytes: _Optional[int] = ..., allocated_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., peak_bytes: _Optional[int] = ...) -> None: ...

class TierStatus(_message.Message):
    __slots__ = ("num_blocks", "num_blocks_free", "num_blocks_used", "num_blocks_cached", "num_blocks_copying", "num_hit_tokens", "num_evicted_blocks", "num_blocks_pageable")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_COPYING_FIELD_NUMBER: _ClassVar[int]
    NUM_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_PAGEABLE_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    num_blocks_free: int
    num_blocks_used: int
    num_blocks_cached: int
    num_blocks_copying: int
    num_hit_tokens: int
    num_evicted_blocks: int
    num_blocks_pageable: int
    def __init__(self, num_blocks: _Optional[int] = ..., num_blocks_free: _Optional[int] = ..., num_blocks_used: _Optional[int] = ..., num_blocks_cached: _Optional[int] = ..., num_blocks_copying: _Optional[int] = ..., num_hit_tokens: _Optional[int] = ..., num_evicted_blocks: _Optional[int] = ..., num_blocks_pageable: _Optional[int] = ...) -> None: ...

class CopyStatus(_message.Message):
    __slots__ = ("num_stored_blocks", "num_stored_bytes", "num_loaded_blocks", "num_loaded_bytes", "num_failed_blocks", "num_refused_blocks", "num_unsaved_blocks")
    NUM_STORED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_LOADED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_REFUSED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_UNSAVED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_stored_blocks: int
    num_stored_bytes: int
    num_loaded_blocks: int
    num_loaded_bytes: int
    num_failed_blocks: int
    num_refused_blocks: int
    num_unsaved_blocks: int
    def __init__(self, num_stored_blocks: _Optional[int] = ..., num_stored_bytes: _Optional[int] = ..., num_loaded_blocks: _Optional[int] = ..., num_loaded_bytes: _Optional[int] = ..., num_failed_blocks: _Optional[int] = ..., num_refused_blocks: _Optional[int] = ..., num_unsaved_blocks: _Optional[int] = ...) -> None: ...

class DecisionStatus(_message.Message):
    __slots__ = ("num_loads", "num_recomputes", "num_loaded_tokens", "num_recomputed_tokens", "predicted_load_s", "actual_load_s", "num_swap_preemptions", "num_recompute_preemptions")
    NUM_LOADS_FIELD_NUMBER: _ClassVar[int]
    NUM_RECOMPUTES_FIELD_NUMBER: _ClassVar[int]
    NUM_LOADED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_RECOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_LOAD_S_FIELD_NUMBER: _ClassVar[int]
    ACTUAL_LOAD_S_FIELD_NUMBER: _ClassVar[int]
    NUM_SWAP_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_RECOMPUTE_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    num_loads: int
    num_recomputes: int
    num_loaded_tokens: int
    num_recomputed_tokens: int
    predicted_load_s: float
    actual_load_s: float
    num_swap_preemptions: int
    num_recompute_preemptions: int
    def __init__(self, num_loads: _Optional[int] = ..., num_recomputes: _Optional[int] = ..., num_loaded_tokens: _Optional[int] = ..., num_recomputed_tokens: _Optional[int] = ..., predicted_load_s: _Optional[float] = ..., actual_load_s: _Optional[float] = ..., num_swap_preemptions: _Optional[int] = ..., num_recompute_preemptions: _Optional[int] = ...) -> None: ...

class CostStatus(_message.Message):
    __slots__ = ("step_s", "prefill_token_s", "prefill_context_s", "decode_row_s", "decode_context_s", "load_latency_s", "load_bytes_per_s", "store_latency_s", "store_bytes_per_s")
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_CONTEXT_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_ROW_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_CONTEXT_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    STORE_LATENCY_S_FIELD_NUMBER: _ClassVar[int]
    STORE_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    step_s: float
    prefill_token_s: float
    prefill_context_s: float
    decode_row_s: float
    decode_context_s: float
    load_latency_s: float
    load_bytes_per_s: float
    store_latency_s: float
    store_bytes_per_s: float
    def __init__(self, step_s: _Optional[float] = ..., prefill_token_s: _Optional[float] = ..., prefill_context_s: _Optional[float] = ..., decode_row_s: _Optional[float] = ..., decode_context_s: _Optional[float] = ..., load_latency_s: _Optional[float] = ..., load_bytes_per_s: _Optional[float] = ..., store_latency_s: _Optional[float] = ..., store_bytes_per_s: _Optional[float] = ...) -> None: ...

class QueueStatus(_message.Message):
    __slots__ = ("priority", "tenant", "num_requests", "num_tokens")
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    priority: _inference_pb2.Priority
    tenant: str
    num_requests: int
    num_tokens: int
    def __init__(self, priority: _Optional[_Union[_inference_pb2.Priority, str]] = ..., tenant: _Optional[str] = ..., num_requests: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...
