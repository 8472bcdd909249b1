"""A Generate call in plain types: what was asked, and what goes out.

Checked and resolved by convert_public, worked on by the gateway. Does not know protobuf.
"""

from dataclasses import dataclass
from enum import Enum

from rillgate_server.core.request import PriorityClass, Speculation
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import TokenLogprobs


class EndReason(Enum):
    """Why a choice ended, as the caller sees it."""

    STOP = "stop"
    LENGTH = "length"
    STOP_STRING = "stop_string"
    DEADLINE = "deadline"


# -- what was asked -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextInput:
    """Plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatInput:
    """A conversation."""

    messages: tuple[tuple[str, str], ...]
    """(role, content), oldest first."""


@dataclass(frozen=True, slots=True)
class TokenInput:
    """Token ids, below the vocabulary's size."""

    token_ids: tuple[int, ...]


PromptInput = TextInput | ChatInput | TokenInput


@dataclass(frozen=True, slots=True)
class GivenChoice:
    """What the caller already has of one choice."""

    index: int
    token_ids: tuple[int, ...] = ()
    end_reason: EndReason | None = None
    """Set: the choice must not be made again."""


@dataclass(frozen=True, slots=True)
class Resumption:
    """A continuation whose version and seed were checked; its digest is the gateway's to check."""

    request_id: str
    prompt_digest: bytes
    template_time_ms: int
    choices: tuple[GivenChoice, ...]
    """Indices are distinct and below n."""


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One request: everything that can be checked without the prompt's length was."""

    prompt: PromptInput
    sampling: SamplingParams
    num_choices: int = 1
    max_tokens: int | None = None
    """None: what the context leaves."""
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Beside the model's own."""
    ignore_eos: bool = False
    resumption: Resumption | None = None
    priority: PriorityClass = PriorityClass.NORMAL
    speculation: Speculation | None = None
    """None: as the replica is set."""


# -- what goes out --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """What was decided at the start."""

    request_id: str
    model_version: str
    seed: int
    num_prompt_tokens: int
    num_cached_tokens: int
    prompt_digest: bytes
    template_time_ms: int
    is_resumed: bool


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """New tokens and new text of one choice; neither needs the other."""

    choice_index: int
    token_offset: int
    token_ids: tuple[int, ...]
    text: str = ""
    reasoning_text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What one choice took."""

    prompt_tokens: int
    completion_tokens: int
    """From the original start."""
    cached_tokens: int = 0
    cached_host_tokens: int = 0
    """Those of cached_tokens that came from the host tier."""
    num_preemptions: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    tokens_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """The end of one choice."""

    choice_index: int
    reason: EndReason
    usage: Usage
    stop_string: str = ""


@dataclass(frozen=True, slots=True)
class StreamUpdate:
    """One message's worth."""

    started: Started | None = None
    outputs: tuple[OutputDelta, ...] = ()
    """At most one per choice."""
    ended: tuple[ChoiceEnd, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
