"""What the client takes and gives: plain frozen values, no protobuf type among them.

Owns the shapes. Knows nothing of the wire: `_convert` translates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeAlias, TypedDict


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation."""

    role: str
    """`system`, `user`, `assistant`, or what the model's template knows."""
    content: str


Messages: TypeAlias = Sequence[ChatMessage | Mapping[str, str]]
"""A conversation, oldest first; a mapping has the keys `role` and `content`."""
Prompt: TypeAlias = str | Sequence[int] | Messages
"""Plain text, token ids used as they are, or a conversation for the model's chat template."""


class FinishReason(Enum):
    """Why a choice ended."""

    STOP = "stop"
    """The model's end of sequence, or one of `stop_token_ids`."""
    LENGTH = "length"
    """`max_tokens`."""
    STOP_STRING = "stop_string"
    """One of `stop`."""
    DEADLINE = "deadline"
    """The deadline came; what there was is here."""
    UNKNOWN = "unknown"
    """A reason that a newer server knows and this client does not."""


class Priority(Enum):
    """Who goes first where requests wait; a class that gets no turn for long moves up for one."""

    HIGH = "high"
    """Somebody is waiting for it."""
    NORMAL = "normal"
    LOW = "low"
    """It can wait."""


class Speculation(Enum):
    """Which tokens are tried ahead; it changes no token, only the time."""

    OFF = "off"
    PROMPT_LOOKUP = "prompt-lookup"
    """What followed the same tokens earlier in the prompt or the answer."""
    DRAFT_MODEL = "draft-model"
    """A small model's, where the server has one."""
    AUTO = "auto"
    """Either, as far as it pays."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities at one position, from the raw logits."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability) of the likeliest, best first."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one choice took."""

    prompt_tokens: int
    completion_tokens: int
    """Generated since the original start, the ending one included."""
    # Where a stream was resumed, what follows speaks of its last part.
    cached_tokens: int
    """Prompt tokens that came from the server's prefix cache."""
    num_preemptions: int
    """Times the request lost its place in the running batch."""
    queue_ms: float
    prefill_ms: float
    """From the queue to the first token."""
    decode_ms: float
    """From the first to the last token."""
    tokens_per_second: float
    """Tokens after the first over `decode_ms`; 0 with fewer than two."""
    cached_host_tokens: int = 0
    """Those of `cached_tokens` that came from the cache's host tier."""


@dataclass(frozen=True, slots=True)
class Started:
    """What the server decided when it began; a continuation is made from it."""

    request_id: str
    """The server's name for this request, in its logs and errors."""
    model_version: str
    seed: int
    """The effective seed: with it the same request can be made again."""
    num_prompt_tokens: int
    num_cached_tokens: int
    prompt_digest: bytes
    template_time_ms: int
    resumed: bool
    """True when the stream goes on from given tokens."""


@dataclass(frozen=True, slots=True)
class ContinuedChoice:
    """What a caller has of one choice."""

    index: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    """Set when the choice is finished and must not be made again."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """Enough to go on with a broken stream, on this server or another with the same model."""

    request_id: str
    model_version: str
    seed: int
    prompt_digest: bytes
    template_time_ms: int
    choices: tuple[ContinuedChoice, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one message of a stream adds to one choice."""

    choice_index: int
    text: str
    """New text of the answer."""
    reasoning_text: str
    """New text of the reasoning."""
    token_ids: tuple[int, ...]
    """New tokens; their text may come in a later chunk."""
    token_offset: int
    """Tokens of this choice before these, given ones included."""
    logprobs: tuple[TokenLogprobs, ...]
    """One per new token, when asked for."""
    finish_reason: FinishReason | None
    """Set in the choice's last chunk."""
    stop_string: str
    """The stop string that matched, if one did."""
    usage: Usage | None
    """Set in the choice's last chunk."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole answer."""

    index: int
    text: str
    reasoning_text: str
    token_ids: tuple[int, ...]
    """All tokens, those of a continuation excluded."""
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop_string: str
    usage: Usage


@dataclass(frozen=True, slots=True)
class Generation:
    """All answers to one request; the properties speak of the first (n is 1 mostly)."""

    started: Started
    choices: tuple[Choice, ...]
    """By index; with a continuation, those that were not finished before."""
    prompt_logprobs: tuple[TokenLogprobs, ...]
    """When asked for; the first token has none."""
    num_resumes: int = 0
    """Times that the client went on after a break."""

    @property
    def text(self) -> str:
        """Give the answer."""
        return self.choices[0].text

    @property
    def reasoning_text(self) -> str:
        """Give the reasoning."""
        return self.choices[0].reasoning_text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Give all tokens, reasoning and answer."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Say why it ended."""
        return self.choices[0].finish_reason

    @property
    def usage(self) -> Usage:
        """Say what it took."""
        return self.choices[0].usage


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of every generating method; what is left out, the model decides."""

    model: str
    """A name from `models()`, optionally `name@version`. Default: the server's only model."""
    max_tokens: int
    """Most tokens per choice. Default: what the model's context leaves."""
    min_tokens: int
    """Tokens before which nothing but `max_tokens` ends a choice. Default: 0."""
    stop: str | Sequence[str]
    """Texts that end a choice; the match is not returned. At most 16."""
    stop_token_ids: Sequence[int]
    """Tokens that end a choice, beside the model's own."""
    ignore_eos: bool
    """Goes on after the model's end of sequence. Default: False."""
    temperature: float
    """0 takes the likeliest token. 0 to 100."""
    top_p: float
    """Keeps the likeliest tokens whose probabilities reach this sum. (0, 1]."""
    top_k: int
    """Keeps this many of the likeliest tokens; 0 keeps all."""
    min_p: float
    """Drops tokens less likely than this fraction of the likeliest. [0, 1]."""
    repetition_penalty: float
    """Over 1 makes tokens of the prompt and the answer less likely. (0, 100]."""
    presence_penalty: float
    """Taken once from tokens that the answer holds. [-2, 2]."""
    frequency_penalty: float
    """Taken from a token for each time the answer holds it. [-2, 2]."""
    logit_bias: Mapping[int, float]
    """Added to logits, by token id. Each in [-100, 100]."""
    seed: int
    """Keys the draws; 64 bits. Default: the server chooses and says so in `started.seed`."""
    n: int
    """Answers to the one prompt. 1 to 64. Default: 1."""
    logprobs: int
    """Asks for log-probabilities: the sampled token's and this many of the likeliest. 0 to 20."""
    prompt_logprobs: int
    """The same for the prompt's tokens."""
    continuation: Continuation
    """Goes on from tokens that are already there; give the same prompt and options again."""
    priority: Priority | Literal["high", "normal", "low"]
    """Who goes first where requests wait. Default: normal."""
    speculation: Speculation | Literal["off", "prompt-lookup", "draft-model", "auto"]
    """Which tokens are tried ahead. Default: as the server is set."""
    timeout_s: float
    """The deadline, from now: by then the answer ends with what there is. Default: the client's."""


@dataclass(frozen=True, slots=True)
class Tokenization:
    """A prompt as the model sees it."""

    token_ids: tuple[int, ...]
    max_context_tokens: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model that the server answers for."""

    name: str
    version: str
    """Digest of the checkpoint."""
    max_context_tokens: int
    """Prompt and answer together."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
