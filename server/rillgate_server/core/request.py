"""A request as the engine takes it: token ids in, every value resolved.

Frozen: what changes while a request runs belongs to the scheduler. Does not know text, tenants'
names, gRPC, or which stream asked.
"""

from dataclasses import dataclass
from enum import Enum, IntEnum

from rillgate_server.core.sampling_params import SamplingParams

NO_SALT = bytes(16)
"""The salt of a prefix that anybody may share."""


class PriorityClass(IntEnum):
    """Who goes first; lower numbers do."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


class Speculation(Enum):
    """Where the drafts of a choice come from: tokens that a step tries before they are drawn."""

    OFF = "off"
    PROMPT_LOOKUP = "prompt-lookup"
    """From what followed the same tokens earlier in the prompt or the answer."""
    DRAFT_MODEL = "draft-model"
    AUTO = "auto"
    """From either, as far as it pays."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """On whose account a request runs. Only a gateway says so, from the connection."""

    name: str = ""
    """Empty: the one of all callers without an identity."""
    weight: float = 1.0
    """Its share among tenants that compete, above 0."""


DEFAULT_TENANT = Tenant()


@dataclass(frozen=True, slots=True)
class ChoiceStart:
    """One unfinished choice, and what was already generated for it."""

    index: int
    """Its index in the caller's request; keys its draws."""
    generated_token_ids: tuple[int, ...] = ()
    """Tokens to replay; empty = a fresh start."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the scheduler is given by `add`."""

    request_id: int
    """Unique in the engine's life."""
    prompt_token_ids: tuple[int, ...]
    """At least one."""
    choices: tuple[ChoiceStart, ...]
    """At least one; indices are distinct."""
    sampling: SamplingParams
    """Shared by the choices; a choice's index keys its draws."""
    max_tokens: int
    """Most tokens per choice from the original start; the context leaves room for them."""
    stop_token_ids: frozenset[int] = frozenset()
    """Ids that end a choice once it has `sampling.min_tokens`; the model's own are in it unless the
    caller ignores them."""
    cache_salt: bytes = NO_SALT
    """16 bytes, mixed into the block hashes."""
    num_shared_prefix_tokens: int = 0
    """The prompt's first tokens that an operator declared shared: blocks wholly inside carry no
    salt."""
    tenant: Tenant = DEFAULT_TENANT
    priority: PriorityClass = PriorityClass.NORMAL
    arrival_s: float = 0.0
    """When it arrived, on the engine's clock; earlier than its `add` if it waited elsewhere."""
    deadline_s: float | None = None
    """When its caller gives up, on the engine's clock; None: never."""
    speculation: Speculation | None = None
    """None: as the server is set."""


class FinishReason(Enum):
    """Why the engine ended a choice."""

    STOP = "stop"
    LENGTH = "length"


class RejectReason(Enum):
    """Why a request was not taken on."""

    INVALID = "invalid"
    TOO_LONG = "too_long"
    OVERLOADED = "overloaded"
    DEADLINE_NEVER = "deadline_never"
    """Could not make its deadline on an idle replica either."""
    DEADLINE_NOW = "deadline_now"
    """Cannot make its deadline behind what waits here."""
    DRAINING = "draining"
    NO_DRAFT_MODEL = "no_draft_model"
    """Asks for a draft model, and there is none here."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A request that was not taken on, and was never queued."""

    reason: RejectReason
    message: str
    """For the caller; gives the numbers."""
    asked: int = 0
    free: int = 0
    limit: int = 0
    retry_after_s: float = 0.0
    """Predicted time until a retry can pay."""
    predicted_ttft_s: float = 0.0
    """Predicted time to the first token; 0 where nothing was predicted."""


@dataclass(frozen=True, slots=True)
class RequestRejected:
    """The engine's answer to a request that it did not take on; nothing follows for it."""

    request_id: int
    rejection: Rejection
