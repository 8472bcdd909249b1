"""What the fake server answers, as values and as messages of the protocol.

Owns a reply's tokens and texts at every position, and what is read from a request. Pure: knows
nothing of servers, threads and time.
"""

from dataclasses import dataclass, field
from hashlib import blake2b

from rillgate._convert_response import to_reason
from rillgate._fake_wire import MAX_CONTEXT_TOKENS, MODEL_VERSION
from rillgate.errors import FieldViolation
from rillgate.types import ChatMessage, ContinuedChoice, FinishReason, Priority, Speculation
from rillgate_proto.v1 import inference_pb2 as pb

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}

_PRIORITIES: dict[int, str] = {
    pb.PRIORITY_HIGH: Priority.HIGH.value,
    pb.PRIORITY_NORMAL: Priority.NORMAL.value,
    pb.PRIORITY_LOW: Priority.LOW.value,
}
_SPECULATIONS: dict[int, str] = {
    pb.SPECULATION_OFF: Speculation.OFF.value,
    pb.SPECULATION_PROMPT_LOOKUP: Speculation.PROMPT_LOOKUP.value,
    pb.SPECULATION_DRAFT_MODEL: Speculation.DRAFT_MODEL.value,
    pb.SPECULATION_AUTO: Speculation.AUTO.value,
}


@dataclass(frozen=True, slots=True)
class FakeError:
    """How a call fails.

    With a `request_id` it is the server's own word. Without one, as gRPC itself says INTERNAL,
    UNKNOWN or CANCELLED where a stream was reset, it is a broken connection.
    """

    code: str
    """Name of a gRPC status: `UNAVAILABLE`, `INVALID_ARGUMENT`, …"""
    message: str = "as the test asked"
    retry_after_s: float | None = None
    violations: tuple[FieldViolation, ...] = ()
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class FakeReply:
    """One answer."""

    text: str
    reasoning_text: str = ""
    finish_reason: FinishReason = FinishReason.STOP
    stop_string: str = ""
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    hold_after: int | None = None
    """Says nothing more after so many tokens, until `release()` or the caller goes away."""
    fail_after: int | None = None
    """Breaks with `error` once it has sent so many tokens, 0: before anything; more than it has: in
    the place of OK. A continuation that was given them does not break there again."""
    error: FakeError = field(default_factory=lambda: FakeError("UNAVAILABLE"))
    first_token_delay_s: float = 0.0
    token_interval_s: float = 0.0

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Give the tokens that this reply is sent as."""
        return tuple((self.reasoning_text + self.text).encode())

    @property
    def request_id(self) -> str:
        """Name the requests that get this reply: the same name for the same reply."""
        return f"fake-{blake2b(repr(self).encode(), digest_size=8).hexdigest()}"


@dataclass(frozen=True, slots=True)
class FakeRequest:
    """What a caller asked: `prompt`, `messages` or `token_ids`, and the fields that were set."""

    prompt: str | None
    messages: tuple[ChatMessage, ...]
    token_ids: tuple[int, ...]
    options: dict[str, object]
    """By the names of GenerateOptions; texts, numbers, tuples and dicts."""
    timeout_s: float | None
    """What was left of the caller's deadline."""
    given: tuple[ContinuedChoice, ...] = ()
    """What the caller of a continuation has already."""


def num_prompt_tokens(request: FakeRequest) -> int:
    """Count the prompt's tokens: its ids, or the bytes of its texts."""
    if request.token_ids:
        return len(request.token_ids)
    texts = [request.prompt or "", *(message.content for message in request.messages)]
    return sum(len(text.encode()) for text in texts)


def to_request(message: pb.GenerateRequest, timeout_s: float | None) -> FakeRequest:
    """Say what a caller asked."""
    options: dict[str, object] = {"model": message.model} if message.model else {}
    if message.priority:
        options["priority"] = _PRIORITIES[message.priority]
    if message.speculation:
        options["speculation"] = _SPECULATIONS[message.speculation]
    for group in (message.sampling, message.stopping, message.response):
        for descriptor, value in group.ListFields():
            name = "stop" if descriptor.name == "stop_strings" else descriptor.name
            if name == "logit_bias":
                options[name] = dict(value)
            else:
                options[name] = value if isinstance(value, (int, float)) else tuple(value)
    return FakeRequest(
        prompt=message.prompt if message.WhichOneof("input") == "prompt" else None,
        messages=tuple(ChatMessage(m.role, m.content) for m in message.chat.messages),
        token_ids=tuple(message.token_ids.ids),
        options=options,
        # Without a deadline gRPC says 2^63 s.
        timeout_s=timeout_s if timeout_s is not None and timeout_s < 1e9 else None,
        given=tuple(
            ContinuedChoice(
                choice.index,
                tuple(choice.token_ids),
                to_reason(choice.finish_reason) if choice.finish_reason else None,
            )
            for choice in message.continuation.choices
        ),
    )


def reply_tokens(message: pb.GenerateRequest, reply: FakeReply) -> tuple[bytes, pb.FinishReason]:
    """Cut the reply at max_tokens; repeat it up to there where no end may come before."""
    token_ids = bytes(reply.token_ids)
    max_tokens = message.stopping.max_tokens or MAX_CONTEXT_TOKENS
    if message.stopping.ignore_eos and token_ids:
        token_ids *= 1 + max_tokens // len(token_ids)
    if len(token_ids) > max_tokens or message.stopping.ignore_eos:
        return token_ids[:max_tokens], pb.FINISH_REASON_LENGTH
    return token_ids, _REASONS[reply.finish_reason]


def output_message(
    index: int, token_ids: bytes, span: tuple[int, int], reply: FakeReply
) -> pb.Output:
    """Send the tokens of a span, with the text that is whole by its end and was not before."""
    first, end = span
    num_reasoning = len(reply.reasoning_text.encode())
    answer_first, answer_end = max(0, first - num_reasoning), max(0, end - num_reasoning)
    return pb.Output(
        choice_index=index,
        token_offset=first,
        token_ids=token_ids[first:end],
        reasoning_text=_new_text(token_ids[:num_reasoning], first, end),
        text=_new_text(token_ids[num_reasoning:], answer_first, answer_end),
    )


def _new_text(text: bytes, first: int, end: int) -> str:
    before = text[:first].decode("utf-8", "ignore")
    return text[:end].decode("utf-8", "ignore")[len(before) :]


def started_message(
    message: pb.GenerateRequest, request: FakeRequest, reply: FakeReply
) -> pb.Started:
    """Say what was decided; a continuation goes on with what it was begun with."""
    is_resumed = message.HasField("continuation")
    seed = message.sampling.seed if message.sampling.HasField("seed") else 1
    return pb.Started(
        request_id=reply.request_id,
        model_version=MODEL_VERSION,
        seed=message.continuation.seed if is_resumed else seed,
        num_prompt_tokens=num_prompt_tokens(request),
        num_cached_tokens=reply.num_cached_tokens,
        prompt_digest=bytes(16),
        resumed=is_resumed,
    )


def finished_message(
    index: int, request: FakeRequest, reply: FakeReply, end: tuple[int, pb.FinishReason]
) -> pb.Finished:
    """Say how a choice ended: after how many tokens, and why."""
    num_tokens, reason = end
    return pb.Finished(
        choice_index=index,
        reason=reason,
        stop_string=reply.stop_string if reason == pb.FINISH_REASON_STOP_STRING else "",
        usage=pb.Usage(
            prompt_tokens=num_prompt_tokens(request),
            completion_tokens=num_tokens,
            cached_tokens=reply.num_cached_tokens,
            num_preemptions=reply.num_preemptions,
        ),
    )
