from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineSpeculation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENGINE_SPECULATION_UNSPECIFIED: _ClassVar[EngineSpeculation]
    ENGINE_SPECULATION_OFF: _ClassVar[EngineSpeculation]
    ENGINE_SPECULATION_PROMPT_LOOKUP: _ClassVar[EngineSpeculation]
    ENGINE_SPECULATION_DRAFT_MODEL: _ClassVar[EngineSpeculation]
    ENGINE_SPECULATION_AUTO: _ClassVar[EngineSpeculation]

class EnginePriority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENGINE_PRIORITY_UNSPECIFIED: _ClassVar[EnginePriority]
    ENGINE_PRIORITY_HIGH: _ClassVar[EnginePriority]
    ENGINE_PRIORITY_NORMAL: _ClassVar[EnginePriority]
    ENGINE_PRIORITY_LOW: _ClassVar[EnginePriority]

class EngineFinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENGINE_FINISH_REASON_UNSPECIFIED: _ClassVar[EngineFinishReason]
    ENGINE_FINISH_REASON_STOP: _ClassVar[EngineFinishReason]
    ENGINE_FINISH_REASON_LENGTH: _ClassVar[EngineFinishReason]

class RejectReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REJECT_REASON_UNSPECIFIED: _ClassVar[RejectReason]
    REJECT_REASON_INVALID: _ClassVar[RejectReason]
    REJECT_REASON_TOO_LONG: _ClassVar[RejectReason]
    REJECT_REASON_OVERLOADED: _ClassVar[RejectReason]
    REJECT_REASON_DRAINING: _ClassVar[RejectReason]
    REJECT_REASON_DEADLINE_NEVER: _ClassVar[RejectReason]
    REJECT_REASON_DEADLINE_NOW: _ClassVar[RejectReason]
    REJECT_REASON_NO_DRAFT_MODEL: _ClassVar[RejectReason]

class CacheTier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CACHE_TIER_UNSPECIFIED: _ClassVar[CacheTier]
    CACHE_TIER_DEVICE: _ClassVar[CacheTier]
    CACHE_TIER_HOST: _ClassVar[CacheTier]

class EngineState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENGINE_STATE_UNSPECIFIED: _ClassVar[EngineState]
    ENGINE_STATE_READY: _ClassVar[EngineState]
    ENGINE_STATE_DRAINING: _ClassVar[EngineState]
ENGINE_SPECULATION_UNSPECIFIED: EngineSpeculation
ENGINE_SPECULATION_OFF: EngineSpeculation
ENGINE_SPECULATION_PROMPT_LOOKUP: EngineSpeculation
ENGINE_SPECULATION_DRAFT_MODEL: EngineSpeculation
ENGINE_SPECULATION_AUTO: EngineSpeculation
ENGINE_PRIORITY_UNSPECIFIED: EnginePriority
ENGINE_PRIORITY_HIGH: EnginePriority
ENGINE_PRIORITY_NORMAL: EnginePriority
ENGINE_PRIORITY_LOW: EnginePriority
ENGINE_FINISH_REASON_UNSPECIFIED: EngineFinishReason
ENGINE_FINISH_REASON_STOP: EngineFinishReason
ENGINE_FINISH_REASON_LENGTH: EngineFinishReason
REJECT_REASON_UNSPECIFIED: RejectReason
REJECT_REASON_INVALID: RejectReason
REJECT_REASON_TOO_LONG: RejectReason
REJECT_REASON_OVERLOADED: RejectReason
REJECT_REASON_DRAINING: RejectReason
REJECT_REASON_DEADLINE_NEVER: RejectReason
REJECT_REASON_DEADLINE_NOW: RejectReason
REJECT_REASON_NO_DRAFT_MODEL: RejectReason
CACHE_TIER_UNSPECIFIED: CacheTier
CACHE_TIER_DEVICE: CacheTier
CACHE_TIER_HOST: CacheTier
ENGINE_STATE_UNSPECIFIED: EngineState
ENGINE_STATE_READY: EngineState
ENGINE_STATE_DRAINING: EngineState

class EngineCommand(_message.Message):
    __slots__ = ("submit", "abort")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    abort: Abort
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request_key", "request_id", "cache_salt", "prompt_token_ids", "choices", "sampling", "max_tokens", "min_tokens", "stop_token_ids", "ignore_eos", "num_logprobs", "num_prompt_logprobs", "tenant", "tenant_weight", "priority_class", "shared_prefix_tokens", "time_remaining_ms", "waited_ms", "speculation")
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TENANT_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_CLASS_FIELD_NUMBER: _ClassVar[int]
    SHARED_PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIME_REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    WAITED_MS_FIELD_NUMBER: _ClassVar[int]
    SPECULATION_FIELD_NUMBER: _ClassVar[int]
    request_key: int
    request_id: str
    cache_salt: bytes
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    choices: _containers.RepeatedCompositeFieldContainer[SubmitChoice]
    sampling: EngineSampling
    max_tokens: int
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    num_logprobs: int
    num_prompt_logprobs: int
    tenant: str
    tenant_weight: float
    priority_class: EnginePriority
    shared_prefix_tokens: int
    time_remaining_ms: int
    waited_ms: int
    speculation: EngineSpeculation
    def __init__(self, request_key: _Optional[int] = ..., request_id: _Optional[str] = ..., cache_salt: _Optional[bytes] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., choices: _Optional[_Iterable[_Union[SubmitChoice, _Mapping]]] = ..., sampling: _Optional[_Union[EngineSampling, _Mapping]] = ..., max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., num_logprobs: _Optional[int] = ..., num_prompt_logprobs: _Optional[int] = ..., tenant: _Optional[str] = ..., tenant_weight: _Optional[float] = ..., priority_class: _Optional[_Union[EnginePriority, str]] = ..., shared_prefix_tokens: _Optional[int] = ..., time_remaining_ms: _Optional[int] = ..., waited_ms: _Optional[int] = ..., speculation: _Optional[_Union[EngineSpeculation, str]] = ...) -> None: ...

class SubmitChoice(_message.Message):
    __slots__ = ("index", "generated_token_ids")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    index: int
    generated_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, index: _Optional[int] = ..., generated_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class EngineSampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., seed: _Optional[int] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("request_key", "choice_indices")
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    CHOICE_INDICES_FIELD_NUMBER: _ClassVar[int]
    request_key: int
    choice_indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_key: _Optional[int] = ..., choice_indices: _Optional[_Iterable[int]] = ...) -> None: ...

class EngineEvent(_message.Message):
    __slots__ = ("step_output", "rejected")
    STEP_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    step_output: StepOutput
    rejected: Rejected
    def __init__(self, step_output: _Optional[_Union[StepOutput, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ...) -> None: ...

class StepOutput(_message.Message):
    __slots__ = ("step_id", "request_key", "choice_index", "token_offset", "num_tokens", "token_ids", "logprobs", "started", "finished", "failed")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    CHOICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_OFFSET_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    request_key: _containers.RepeatedScalarFieldContainer[int]
    choice_index: _containers.RepeatedScalarFieldContainer[int]
    token_offset: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[EntryLogprobs]
    started: _containers.RepeatedCompositeFieldContainer[RequestStarted]
    finished: _containers.RepeatedCompositeFieldContainer[ChoiceFinished]
    failed: _containers.RepeatedCompositeFieldContainer[RequestFailed]
    def __init__(self, step_id: _Optional[int] = ..., request_key: _Optional[_Iterable[int]] = ..., choice_index: _Optional[_Iterable[int]] = ..., token_offset: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[EntryLogprobs, _Mapping]]] = ..., started: _Optional[_Iterable[_Union[RequestStarted, _Mapping]]] = ..., finished: _Optional[_Iterable[_Union[ChoiceFinished, _Mapping]]] = ..., failed: _Optional[_Iterable[_Union[RequestFailed, _Mapping]]] = ...) -> None: ...

class EntryLogprobs(_message.Message):
    __slots__ = ("entry", "request_key", "positions")
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    entry: int
    request_key: int
    positions: _containers.RepeatedCompositeFieldContainer[EngineTokenLogprobs]
    def __init__(self, entry: _Optional[int] = ..., request_key: _Optional[int] = ..., positions: _Optional[_Iterable[_Union[EngineTokenLogprobs, _Mapping]]] = ...) -> None: ...

class EngineTokenLogprobs(_message.Message):
    __slots__ = ("token_id", "logprob", "top_token_ids", "top_logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class RequestStarted(_message.Message):
    __slots__ = ("request_key", "queue_ms", "cached_device_tokens", "cached_host_tokens")
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    CACHED_DEVICE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_HOST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_key: int
    queue_ms: float
    cached_device_tokens: int
    cached_host_tokens: int
    def __init__(self, request_key: _Optional[int] = ..., queue_ms: _Optional[float] = ..., cached_device_tokens: _Optional[int] = ..., cached_host_tokens: _Optional[int] = ...) -> None: ...

class ChoiceFinished(_message.Message):
    __slots__ = ("request_key", "choice_index", "reason", "num_tokens", "num_preemptions")
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    CHOICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    request_key: int
    choice_index: int
    reason: EngineFinishReason
    num_tokens: int
    num_preemptions: int
    def __init__(self, request_key: _Optional[int] = ..., choice_index: _Optional[int] = ..., reason: _Optional[_Union[EngineFinishReason, str]] = ..., num_tokens: _Optional[int] = ..., num_preemptions: _Optional[int] = ...) -> None: ...

class RequestFailed(_message.Message):
    __slots__ = ("request_key", "message")
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    request_key: int
    message: str
    def __init__(self, request_key: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("request_key", "reason", "asked", "free", "limit", "retry_after_ms", "message", "predicted_ttft_ms")
    REQUEST_KEY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    request_key: int
    reason: RejectReason
    asked: int
    free: int
    limit: int
    retry_after_ms: int
    message: str
    predicted_ttft_ms: int
    def __init__(self, request_key: _Optional[int] = ..., reason: _Optional[_Union[RejectReason, str]] = ..., asked: _Optional[int] = ..., free: _Optional[int] = ..., limit: _Optional[int] = ..., retry_after_ms: _Optional[int] = ..., message: _Optional[str] = ..., predicted_ttft_ms: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("with_blocks",)
    WITH_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    with_blocks: bool
    def __init__(self, with_blocks: bool = ...) -> None: ...

class ReplicaEvent(_message.Message):
    __slots__ = ("welcome", "load", "blocks")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    load: Load
    blocks: Blocks
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., blocks: _Optional[_Union[Blocks, _Mapping]] = ...) -> None: ...

class Blocks(_message.Message):
    __slots__ = ("sequence", "snapshot_chunk", "stored", "evicted", "cleared")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_CHUNK_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    snapshot_chunk: BlocksSnapshotChunk
    stored: BlocksChanged
    evicted: BlocksChanged
    cleared: BlocksCleared
    def __init__(self, sequence: _Optional[int] = ..., snapshot_chunk: _Optional[_Union[BlocksSnapshotChunk, _Mapping]] = ..., stored: _Optional[_Union[BlocksChanged, _Mapping]] = ..., evicted: _Optional[_Union[BlocksChanged, _Mapping]] = ..., cleared: _Optional[_Union[BlocksCleared, _Mapping]] = ...) -> None: ...

class BlocksSnapshotChunk(_message.Message):
    __slots__ = ("tier", "hashes", "last")
    TIER_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    tier: CacheTier
    hashes: bytes
    last: bool
    def __init__(self, tier: _Optional[_Union[CacheTier, str]] = ..., hashes: _Optional[bytes] = ..., last: bool = ...) -> None: ...

class BlocksChanged(_message.Message):
    __slots__ = ("tier", "hashes")
    TIER_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    tier: CacheTier
    hashes: bytes
    def __init__(self, tier: _Optional[_Union[CacheTier, str]] = ..., hashes: _Optional[bytes] = ...) -> None: ...

class BlocksCleared(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol_version", "replica_id", "incarnation", "model", "model_version_digest", "tokenizer_digest", "vocab_size", "max_context_tokens", "block_size_tokens", "hash_scheme", "kv_dtype", "tensor_parallel_size", "max_running")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HASH_SCHEME_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    replica_id: str
    incarnation: int
    model: str
    model_version_digest: str
    tokenizer_digest: str
    vocab_size: int
    max_context_tokens: int
    block_size_tokens: int
    hash_scheme: str
    kv_dtype: str
    tensor_parallel_size: int
    max_running: int
    def __init__(self, protocol_version: _Optional[int] = ..., replica_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., model: _Optional[str] = ..., model_version_digest: _Optional[str] = ..., tokenizer_digest: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_context_tokens: _Optional[int] = ..., block_size_tokens: _Optional[int] = ..., hash_scheme: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., tensor_parallel_size: _Optional[int] = ..., max_running: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("step_id", "step_age_ms", "state", "num_running", "num_waiting", "num_running_tokens", "num_waiting_tokens", "device", "prefill_tokens_per_s", "decode_step_ms", "num_preemptions", "num_cached_tokens", "num_prompt_tokens", "num_loading", "host", "copies", "decisions", "costs", "queues", "free_cpu_fraction", "free_device_fraction", "longest_step_ms", "num_drafted_tokens", "num_accepted_tokens", "device_idle_ms_per_step", "num_following_steps", "device_memory")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEP_MS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOADING_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    QUEUES_FIELD_NUMBER: _ClassVar[int]
    FREE_CPU_FRACTION_FIELD_NUMBER: _ClassVar[int]
    FREE_DEVICE_FRACTION_FIELD_NUMBER: _ClassVar[int]
    LONGEST_STEP_MS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_IDLE_MS_PER_STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_FOLLOWING_STEPS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MEMORY_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    step_age_ms: float
    state: EngineState
    num_running: int
    num_waiting: int
    num_running_tokens: int
    num_waiting_tokens: int
    device: TierLoad
    prefill_tokens_per_s: float
    decode_step_ms: float
    num_preemptions: int
    num_cached_tokens: int
    num_prompt_tokens: int
    num_loading: int
    host: TierLoad
    copies: CopyCounts
    decisions: LoadDecisions
    costs: FittedCosts
    queues: _containers.RepeatedCompositeFieldContainer[QueueLoad]
    free_cpu_fraction: float
    free_device_fraction: float
    longest_step_ms: float
    num_drafted_tokens: int
    num_accepted_tokens: int
    device_idle_ms_per_step: float
    num_following_steps: int
    device_memory: DeviceMemory
    def __init__(self, step_id: _Optional[int] = ..., step_age_ms: _Optional[float] = ..., state: _Optional[_Union[EngineState, str]] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_running_tokens: _Optional[int] = ..., num_waiting_tokens: _Optional[int] = ..., device: _Optional[_Union[TierLoad, _Mapping]] = ..., prefill_tokens_per_s: _Optional[float] = ..., decode_step_ms: _Optional[float] = ..., num_preemptions: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., num_loading: _Optional[int] = ..., host: _Optional[_Union[TierLoad, _Mapping]] = ..., copies: _Optional[_Union[CopyCounts, _Mapping]] = ..., decisions: _Optional[_Union[LoadDecisions, _Mapping]] = ..., costs: _Optional[_Union[FittedCosts, _Mapping]] = ..., queues: _Optional[_Iterable[_Union[QueueLoad, _Mapping]]] = ..., free_cpu_fraction: _Optional[float] = ..., free_device_fraction: _Optional[float] = ..., longest_step_ms: _Optional[float] = ..., num_drafted_tokens: _Optional[int] = ..., num_accepted_tokens: _Optional[int] = ..., device_idle_ms_per_step: _Optional[float] = ..., num_following_steps: _Optional[int] = ..., device_memory: _Optional[_Union[DeviceMemory, _Mapping]] = ...) -> None: ...

class DeviceMemory(_message.Message):
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

class TierLoad(_message.Message):
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

class CopyCounts(_message.Message):
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

class LoadDecisions(_message.Message):
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

class FittedCosts(_message.Message):
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

class QueueLoad(_message.Message):
    __slots__ = ("priority_class", "tenant", "num_requests", "num_tokens")
    PRIORITY_CLASS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    priority_class: EnginePriority
    tenant: str
    num_requests: int
    num_tokens: int
    def __init__(self, priority_class: _Optional[_Union[EnginePriority, str]] = ..., tenant: _Optional[str] = ..., num_requests: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class EngineFlushCacheRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EngineFlushCacheResponse(_message.Message):
    __slots__ = ("num_device_blocks", "num_host_blocks")
    NUM_DEVICE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_device_blocks: int
    num_host_blocks: int
    def __init__(self, num_device_blocks: _Optional[int] = ..., num_host_blocks: _Optional[int] = ...) -> None: ...

class EngineDrainRequest(_message.Message):
    __slots__ = ("undo",)
    UNDO_FIELD_NUMBER: _ClassVar[int]
    undo: bool
    def __init__(self, undo: bool = ...) -> None: ...

class EngineDrainResponse(_message.Message):
    __slots__ = ("num_open_requests",)
    NUM_OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    num_open_requests: int
    def __init__(self, num_open_requests: _Optional[int] = ...) -> None: ...
