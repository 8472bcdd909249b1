"""What crosses between the control plane and the data plane: one plan down, one result up.

Plain ints and tuples, no tensors. A plan names rows and positions, never the token that the step
before sampled: the worker keeps each slot's token buffer, penalty counts and block table. So a
plan can be made before the result of the one before it (contracts, section 1).

A slot is the worker's seat for one choice, from its SlotStart to the plan that names it in
`ended_slots`. A preempted choice gives its seat up; when it runs again it gets a new SlotStart
with all of its tokens.

A request's positions, and what a RowPlan computes of them:

    0 ........ start ............ start + num_tokens ....... all tokens known
    |in cache  |computed this step|later                     |
                                 ^ samples: true when this reaches the last known token

A decode row with drafts: it samples at the last known token and at each draft behind it, as far as
each draft equals what was sampled before it.

    0 ........... start | draft | draft | draft      num_tokens = 1 + drafts
    |in cache     |last |                     |
                  ^ sampled ^ sampled ^ not: the first draft was wrong, say
"""

from dataclasses import dataclass, field
from enum import Enum

from rillgate_server.core.request import FinishReason
from rillgate_server.core.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What a step may hold: the data plane makes room for it at the start."""

    max_running: int
    """Slots, and rows of a step."""
    max_step_tokens: int
    max_context_tokens: int
    uses_graphs: bool = True
    """Whether decode steps may be captured in CUDA graphs."""


@dataclass(frozen=True, slots=True)
class SlotStart:
    """A slot that is set up before the step."""

    slot: int
    token_ids: tuple[int, ...]
    """Prompt, then replayed or formerly generated tokens."""
    num_prompt_tokens: int
    block_table: tuple[int, ...]
    """Blocks held so far: prefix hits and what the first chunk needs."""
    sampling: SamplingParams
    choice_index: int


@dataclass(frozen=True, slots=True)
class RowPlan:
    """A run of one slot's positions to compute."""

    slot: int
    start: int
    """Position of its first token."""
    num_tokens: int
    """At least 1; drafts included."""
    new_blocks: tuple[int, ...] = ()
    """Appended to the slot's block table before the step. Blocks of a slot that starts in this
    step are in its SlotStart alone."""
    samples: bool = True
    """Whether its last position samples the next token."""
    prompt_logprobs: bool = False
    """Whether its positions' logits give the prompt's log-probabilities."""
    draft_token_ids: tuple[int, ...] = ()
    """Its last tokens, which nobody has sampled yet: tried, and kept while they are what is drawn.
    Only where it samples, and behind the slot's last known token."""
    num_proposals: int = 0
    """Drafts that the draft model may propose behind what this row samples, for a later plan."""


class CopyDirection(Enum):
    """Between which tiers blocks are copied."""

    DEVICE_TO_HOST = "device_to_host"
    HOST_TO_DEVICE = "host_to_device"


@dataclass(frozen=True, slots=True)
class CopyJob:
    """Whole blocks to copy: begun with the plan, ended whenever, reported in a later result.

    Until it is reported nobody writes its sources, and nobody reads or writes its targets.
    """

    copy_id: int
    """+1 each."""
    direction: CopyDirection
    pairs: tuple[tuple[int, int], ...]
    """(source block, target block); at least one, targets are distinct."""
    checksums: tuple[int, ...] | None = None
    """What the sources must hold, one per pair: HOST_TO_DEVICE in audit mode alone."""


@dataclass(frozen=True, slots=True)
class CopyDone:
    """The end of a copy. Once it is reported, none of its blocks is touched any more."""

    copy_id: int
    failed_pairs: tuple[int, ...] = ()
    """Positions in the job's pairs whose target does not hold what it should."""
    num_bytes: int = 0
    """Of the pairs that arrived."""
    seconds: float = 0.0
    """From its first byte to its last; the wait behind other copies does not count."""
    checksums: tuple[int, ...] = ()
    """Of the pairs: DEVICE_TO_HOST in audit mode alone."""
    message: str = ""
    """Why pairs failed, for the log."""
    num_refused: int = 0
    """Failed pairs that arrived with another checksum (audit mode)."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Results come back in the order of `step_id`.

    A plan without rows only begins its copies, and its result may wait a few milliseconds for a
    copy in flight to end: nothing else is to be done.
    """

    step_id: int
    """+1 each."""
    starts: tuple[SlotStart, ...]
    rows: tuple[RowPlan, ...]
    """Packed in this order; results in this order."""
    ended_slots: tuple[int, ...] = ()
    """Free on the worker before this step's starts: a start of the same plan may reuse one."""
    copies: tuple[CopyJob, ...] = ()
    """Begun before anything else of the step, even of one that then fails."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, from the raw logits."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), best first."""


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A row whose request ends alone."""

    slot: int
    message: str


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where a step's time went, in seconds."""

    model_s: float = 0.0
    sample_s: float = 0.0
    draft_s: float = 0.0
    """Of the draft model."""
    device_idle_s: float = 0.0
    """Before this step: the device had nothing to do although work was there."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the data plane gives back for one plan."""

    step_id: int
    token_ids: tuple[tuple[int, ...], ...]
    """One entry per sampling row, in the plan's order: the accepted drafts and one token more;
    empty if the row failed."""
    logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()
    """One entry per sampling row when any row asked, else empty; in it one per token, or none."""
    prompt_logprobs: tuple[tuple[int, tuple[TokenLogprobs, ...]], ...] = ()
    """(slot, one entry per position of the row that predicts a prompt token)."""
    failed_rows: tuple[FailedRow, ...] = ()
    finished_copies: tuple[CopyDone, ...] = ()
    """All that ended since the last result, in no promised order; those of a plan that has begun
    behind this one may be among them."""
    times: StepTimes = field(default_factory=StepTimes)
    proposals: tuple[tuple[int, ...], ...] = ()
    """The draft model's: one entry per sampling row when any row asked for some, else empty."""


@dataclass(frozen=True, slots=True)
class ChoiceTokens:
    """New tokens of one choice."""

    request_id: int
    choice_index: int
    token_offset: int
    """Tokens of the choice before these, given ones included."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestStarted:
    """A request left the queue for the first time."""

    request_id: int
    queue_s: float
    """From its arrival until it runs; the load of blocks from the host tier is in it."""
    num_cached_tokens: int
    """Prompt tokens found in the cache, in either tier."""
    num_cached_host_tokens: int = 0
    """Those of them that came from the host tier."""


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """A choice ended."""

    request_id: int
    choice_index: int
    reason: FinishReason
    num_tokens: int
    """From the original start."""
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """The prompt's log-probabilities, from its second token on, all at once."""

    request_id: int
    positions: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """A request ended by a fault; nothing follows for any of its choices."""

    request_id: int
    message: str


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step means for the requests. Entries of one kind are in no promised order, but
    for one request: started, then tokens, then finished."""

    step_id: int
    started: tuple[RequestStarted, ...] = ()
    tokens: tuple[ChoiceTokens, ...] = ()
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    finished: tuple[ChoiceFinished, ...] = ()
    failed: tuple[RequestFailed, ...] = ()
