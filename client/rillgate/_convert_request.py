"""From the client's plain values to the requests of the protocol.

Owns which option goes into which field. Limits are the server's: what protobuf itself refuses (a
text that is no Unicode, a number outside the field's type) becomes InvalidRequestError here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TypeGuard, cast

from rillgate.errors import FieldViolation, InvalidRequestError
from rillgate.types import (
    ChatMessage,
    Continuation,
    FinishReason,
    GenerateOptions,
    Messages,
    Priority,
    Prompt,
    Speculation,
)
from rillgate_proto.v1 import control_pb2
from rillgate_proto.v1 import inference_pb2 as pb

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
)
_STOPPING = ("max_tokens", "min_tokens", "ignore_eos")
_RESPONSE = ("logprobs", "prompt_logprobs")

_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    # One that a newer server knows: the choice is finished, which is what counts.
    FinishReason.UNKNOWN: pb.FINISH_REASON_STOP,
}

_PRIORITIES = {
    Priority.HIGH: pb.PRIORITY_HIGH,
    Priority.NORMAL: pb.PRIORITY_NORMAL,
    Priority.LOW: pb.PRIORITY_LOW,
}

_SPECULATIONS = {
    Speculation.OFF: pb.SPECULATION_OFF,
    Speculation.PROMPT_LOOKUP: pb.SPECULATION_PROMPT_LOOKUP,
    Speculation.DRAFT_MODEL: pb.SPECULATION_DRAFT_MODEL,
    Speculation.AUTO: pb.SPECULATION_AUTO,
}


def generate_request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    """Build the request; raise TypeError for an option that does not exist."""
    check_options(options)
    request = pb.GenerateRequest()
    with _field("model"):
        request.model = options.get("model", "")
    _set_prompt(request, prompt)
    for names, message, group in (
        (_SAMPLING, request.sampling, "sampling"),
        (_STOPPING, request.stopping, "stopping"),
        (_RESPONSE, request.response, "response"),
    ):
        for name in names:
            value = options.get(name)
            if value is not None:
                with _field(f"{group}.{name}"):
                    setattr(message, name, value)
    _set_lists(request, options)
    priority = options.get("priority")
    if priority is not None:
        with _field("priority"):
            request.priority = _PRIORITIES[Priority(priority)]
    speculation = options.get("speculation")
    if speculation is not None:
        with _field("speculation"):
            request.speculation = _SPECULATIONS[Speculation(speculation)]
    continuation = options.get("continuation")
    if continuation is not None:
        _set_continuation(request.continuation, continuation)
    return request


def continued_request(
    request: pb.GenerateRequest, continuation: Continuation
) -> pb.GenerateRequest:
    """Copy the request, to go on from `continuation` instead of where it would have begun."""
    again = pb.GenerateRequest()
    again.CopyFrom(request)
    again.ClearField("continuation")
    _set_continuation(again.continuation, continuation)
    return again


def check_options(options: Mapping[str, object]) -> None:
    """Raise TypeError for a name that is no option; a misspelt one must not be dropped."""
    for name in options:
        if name not in GenerateOptions.__annotations__:
            close = get_close_matches(name, GenerateOptions.__annotations__, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"there is no option {name!r}{hint}")


def tokenize_request(prompt: str | Messages, model: str) -> pb.TokenizeRequest:
    """Build the request."""
    request = pb.TokenizeRequest()
    with _field("model"):
        request.model = model
    if isinstance(prompt, str):
        with _field("prompt"):
            request.prompt = prompt
    else:
        _add_messages(request.chat, prompt)
    return request


def detokenize_request(
    token_ids: Sequence[int], model: str, keep_special_tokens: bool
) -> pb.DetokenizeRequest:
    """Build the request."""
    request = pb.DetokenizeRequest(keep_special_tokens=keep_special_tokens)
    with _field("model"):
        request.model = model
    with _field("token_ids"):
        request.token_ids.extend(token_ids)
    return request


def flush_cache_request(model: str) -> control_pb2.FlushCacheRequest:
    """Build the request."""
    request = control_pb2.FlushCacheRequest()
    with _field("model"):
        request.model = model
    return request


def drain_request(
    replica_id: str, time_limit_s: float | None, undo: bool
) -> control_pb2.DrainRequest:
    """Build the request."""
    request = control_pb2.DrainRequest(undo=undo)
    with _field("replica_id"):
        request.replica_id = replica_id
    if time_limit_s is not None:
        with _field("time_limit_ms"):
            # 0 would mean the server's own grace.
            request.time_limit_ms = round(time_limit_s * 1000) or 1
    return request


@contextmanager
def _field(name: str) -> Iterator[None]:
    """Turn protobuf's refusal of a value into our error for the field."""
    try:
        yield
    except (ValueError, OverflowError) as error:  # UnicodeEncodeError is one
        violation = FieldViolation(name, f"cannot be sent: {error}")
        raise InvalidRequestError(str(violation), (violation,)) from error


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        with _field("prompt"):
            request.prompt = prompt
    elif _is_conversation(prompt):
        _add_messages(request.chat, prompt)
    else:
        with _field("token_ids"):
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(cast(Sequence[int], prompt))


def _is_conversation(prompt: Sequence[int] | Messages) -> TypeGuard[Messages]:
    """Tell messages from ids: numpy's integers are ids too, and an empty list counts as ids."""
    return len(prompt) > 0 and isinstance(prompt[0], (ChatMessage, Mapping))


def _add_messages(chat: pb.ChatMessages, messages: Messages) -> None:
    chat.SetInParent()
    for index, message in enumerate(messages):
        role, content = _role_and_content(message)
        with _field(f"chat.messages[{index}]"):
            chat.messages.add(role=role, content=content)


def _role_and_content(message: ChatMessage | Mapping[str, str]) -> tuple[str, str]:
    if isinstance(message, ChatMessage):
        return message.role, message.content
    unknown = set(message) - {"role", "content"}
    if unknown or len(message) != 2:
        raise TypeError(f"a message has the keys 'role' and 'content', not {sorted(message)}")
    return message["role"], message["content"]


def _set_lists(request: pb.GenerateRequest, options: GenerateOptions) -> None:
    stop = options.get("stop")
    if stop is not None:
        with _field("stopping.stop_strings"):
            request.stopping.stop_strings.extend([stop] if isinstance(stop, str) else stop)
    stop_token_ids = options.get("stop_token_ids")
    if stop_token_ids:  # an empty list must not set the group
        with _field("stopping.stop_token_ids"):
            request.stopping.stop_token_ids.extend(stop_token_ids)
    with _field("sampling.logit_bias"):
        for token_id, bias in (options.get("logit_bias") or {}).items():
            request.sampling.logit_bias[token_id] = bias


def _set_continuation(message: pb.Continuation, continuation: Continuation) -> None:
    with _field("continuation"):
        message.request_id = continuation.request_id
        message.model_version = continuation.model_version
        message.seed = continuation.seed
        message.prompt_digest = continuation.prompt_digest
        message.template_time_ms = continuation.template_time_ms
        for choice in continuation.choices:
            message.choices.add(
                index=choice.index,
                token_ids=choice.token_ids,
                finish_reason=_REASONS[choice.finish_reason],
            )
