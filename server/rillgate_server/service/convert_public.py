"""The messages of inference.proto to plain types, checked, and back.

Owns the limits that the proto's comments promise; each refusal names field, value and limit. What
needs the prompt's length is checked by the gateway after it has encoded the prompt. Besides
convert_engine the only module that maps protobuf.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from rillgate_proto.v1 import inference_pb2 as pb
from rillgate_server.config.groups import MAX_MODEL_NAME_BYTES
from rillgate_server.core.model_spec import ModelSpec
from rillgate_server.core.request import PriorityClass, Speculation
from rillgate_server.core.sampling_params import MAX_CHOICES, SamplingParams
from rillgate_server.core.step import TokenLogprobs
from rillgate_server.errors import (
    ContinuationMismatch,
    InvalidRequest,
    ModelNotFound,
    VersionGone,
)
from rillgate_server.service.generate_call import (
    ChatInput,
    ChoiceEnd,
    EndReason,
    GenerateCall,
    GivenChoice,
    OutputDelta,
    PromptInput,
    Resumption,
    Started,
    StreamUpdate,
    TextInput,
    TokenInput,
    Usage,
)

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
MAX_REQUEST_ID_BYTES = 128
MAX_TEMPLATE_TIME_MS = 253_402_300_799_999
"""The last millisecond of the year 9999, the last that a template can print."""

_END_TO_WIRE = {
    EndReason.STOP: pb.FINISH_REASON_STOP,
    EndReason.LENGTH: pb.FINISH_REASON_LENGTH,
    EndReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    EndReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}
_END_FROM_WIRE: dict[int, EndReason | None] = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    **{wire: reason for reason, wire in _END_TO_WIRE.items()},
}

_PRIORITY_FROM_WIRE: dict[int, PriorityClass] = {
    pb.PRIORITY_UNSPECIFIED: PriorityClass.NORMAL,
    pb.PRIORITY_HIGH: PriorityClass.HIGH,
    pb.PRIORITY_NORMAL: PriorityClass.NORMAL,
    pb.PRIORITY_LOW: PriorityClass.LOW,
}
_SPECULATION_FROM_WIRE: dict[int, Speculation | None] = {
    pb.SPECULATION_UNSPECIFIED: None,
    pb.SPECULATION_OFF: Speculation.OFF,
    pb.SPECULATION_PROMPT_LOOKUP: Speculation.PROMPT_LOOKUP,
    pb.SPECULATION_DRAFT_MODEL: Speculation.DRAFT_MODEL,
    pb.SPECULATION_AUTO: Speculation.AUTO,
}


class SamplingDefaults(Protocol):
    """The model's own sampling, for what a request leaves unset."""

    @property
    def temperature(self) -> float: ...  # noqa: D102 (as in SamplingParams, like the rest)
    @property
    def top_p(self) -> float: ...  # noqa: D102
    @property
    def top_k(self) -> int: ...  # noqa: D102
    @property
    def min_p(self) -> float: ...  # noqa: D102
    @property
    def repetition_penalty(self) -> float: ...  # noqa: D102


# -- requests -------------------------------------------------------------------------------------


def check_model(asked: str, spec: ModelSpec) -> None:
    """Raise unless `asked` (`name`, `name@version` or nothing) is what is served."""
    if len(asked.encode()) > MAX_MODEL_NAME_BYTES:
        raise InvalidRequest.of(
            "model", f"{len(asked.encode())} bytes", f"at most {MAX_MODEL_NAME_BYTES} bytes"
        )
    if asked in ("", spec.name):
        return
    name, _, version = asked.partition("@")
    if name != spec.name:
        raise ModelNotFound(asked, (spec.name,))
    if version != spec.version_digest:
        raise VersionGone(version, spec.version_digest)


def to_generate_call(
    message: pb.GenerateRequest,
    spec: ModelSpec,
    defaults: SamplingDefaults,
    new_seed: Callable[[], int],
) -> GenerateCall:
    """Check a request against the model and resolve its defaults; raises what a caller may see."""
    check_model(message.model, spec)
    num_choices = message.sampling.n if message.sampling.HasField("n") else 1
    if not 1 <= num_choices <= MAX_CHOICES:
        raise InvalidRequest.of("sampling.n", num_choices, f"1 to {MAX_CHOICES}")
    _check_stopping(message.stopping, spec)
    call = GenerateCall(
        prompt=to_prompt_input(message, spec),
        sampling=_sampling(message, defaults, new_seed),
        num_choices=num_choices,
        max_tokens=_max_tokens(message.stopping),
        stop_strings=tuple(message.stopping.stop_strings),
        stop_token_ids=tuple(message.stopping.stop_token_ids),
        ignore_eos=message.stopping.ignore_eos,
        resumption=_resumption(message, num_choices, spec),
        priority=_priority(message),
        speculation=_speculation(message),
    )
    call.sampling.validate(spec.vocab_size)
    return call


def to_prompt_input(
    message: pb.GenerateRequest | pb.TokenizeRequest, spec: ModelSpec
) -> PromptInput:
    """Take the one input that is set."""
    kind = message.WhichOneof("input")
    if kind == "prompt":
        if not message.prompt:
            raise InvalidRequest.of("prompt", "empty", "text of at least one token")
        return TextInput(message.prompt)
    if kind == "chat":
        if not message.chat.messages:
            raise InvalidRequest.of("chat.messages", "empty", "1 to 4096 messages")
        return ChatInput(tuple((turn.role, turn.content) for turn in message.chat.messages))
    if kind == "token_ids" and isinstance(message, pb.GenerateRequest):
        if not message.token_ids.ids:
            raise InvalidRequest.of("token_ids.ids", "empty", "at least one token id")
        check_token_ids("token_ids.ids", message.token_ids.ids, spec.vocab_size)
        return TokenInput(tuple(message.token_ids.ids))
    allowed = [field.name for field in message.DESCRIPTOR.oneofs_by_name["input"].fields]
    raise InvalidRequest.of("input", "unset", f"exactly one of {', '.join(allowed)}")


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidRequest that names the first id outside the vocabulary."""
    if token_ids and max(token_ids) >= vocab_size:
        index = next(i for i, token_id in enumerate(token_ids) if token_id >= vocab_size)
        raise InvalidRequest.of(
            f"{field}[{index}]", token_ids[index], f"token ids below {vocab_size}"
        )


def _sampling(
    message: pb.GenerateRequest, defaults: SamplingDefaults, new_seed: Callable[[], int]
) -> SamplingParams:
    given, response = message.sampling, message.response

    def number(field: str, default: float) -> float:
        return _decimal(getattr(given, field)) if given.HasField(field) else default

    return SamplingParams(
        seed=_seed(message, new_seed),
        temperature=number("temperature", defaults.temperature),
        top_p=number("top_p", defaults.top_p),
        top_k=given.top_k if given.HasField("top_k") else defaults.top_k,
        min_p=number("min_p", defaults.min_p),
        repetition_penalty=number("repetition_penalty", defaults.repetition_penalty),
        presence_penalty=number("presence_penalty", 0.0),
        frequency_penalty=number("frequency_penalty", 0.0),
        # Sorted: a map has no order, and equal requests should be equal values.
        logit_bias=tuple(sorted((i, _decimal(bias)) for i, bias in given.logit_bias.items())),
        min_tokens=message.stopping.min_tokens,
        num_logprobs=response.logprobs if response.HasField("logprobs") else None,
        num_prompt_logprobs=(
            response.prompt_logprobs if response.HasField("prompt_logprobs") else None
        ),
    )


def _decimal(value: float) -> float:
    """Return the number that the caller wrote: 0.7 arrives as the float32 0.699999988079071."""
    return float(f"{value:.7g}")


def _priority(message: pb.GenerateRequest) -> PriorityClass:
    if message.priority not in _PRIORITY_FROM_WIRE:
        raise InvalidRequest.of("priority", message.priority, "a value of Priority")
    return _PRIORITY_FROM_WIRE[message.priority]


def _speculation(message: pb.GenerateRequest) -> Speculation | None:
    if message.speculation not in _SPECULATION_FROM_WIRE:
        raise InvalidRequest.of("speculation", message.speculation, "a value of Speculation")
    return _SPECULATION_FROM_WIRE[message.speculation]


def _seed(message: pb.GenerateRequest, new_seed: Callable[[], int]) -> int:
    given = message.sampling.seed if message.sampling.HasField("seed") else None
    if not message.HasField("continuation"):
        return new_seed() if given is None else given
    continued = message.continuation.seed
    if given is not None and given != continued:
        raise ContinuationMismatch("seed", str(continued), str(given))
    return continued


def _max_tokens(stopping: pb.StoppingParams) -> int | None:
    if not stopping.HasField("max_tokens"):
        return None
    if stopping.max_tokens == 0:
        raise InvalidRequest.of(
            "stopping.max_tokens", 0, "1 to what the model's context leaves after the prompt"
        )
    return stopping.max_tokens


def _check_stopping(stopping: pb.StoppingParams, spec: ModelSpec) -> None:
    texts = stopping.stop_strings
    if len(texts) > MAX_STOP_STRINGS:
        raise InvalidRequest.of(
            "stopping.stop_strings", f"{len(texts)} texts", f"at most {MAX_STOP_STRINGS} texts"
        )
    for index, text in enumerate(texts):
        num_bytes = len(text.encode())
        if not 1 <= num_bytes <= MAX_STOP_STRING_BYTES:
            raise InvalidRequest.of(
                f"stopping.stop_strings[{index}]",
                f"{num_bytes} bytes",
                f"1 to {MAX_STOP_STRING_BYTES} bytes",
            )
    ids = stopping.stop_token_ids
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest.of(
            "stopping.stop_token_ids", f"{len(ids)} ids", f"at most {MAX_STOP_TOKEN_IDS} ids"
        )
    check_token_ids("stopping.stop_token_ids", ids, spec.vocab_size)


def _resumption(
    message: pb.GenerateRequest, num_choices: int, spec: ModelSpec
) -> Resumption | None:
    if not message.HasField("continuation"):
        return None
    given = message.continuation
    num_bytes = len(given.request_id.encode())
    if num_bytes > MAX_REQUEST_ID_BYTES:
        raise InvalidRequest.of(
            "continuation.request_id", f"{num_bytes} bytes", f"at most {MAX_REQUEST_ID_BYTES} bytes"
        )
    if given.model_version != spec.version_digest:
        raise VersionGone(given.model_version, spec.version_digest)
    if not 0 <= given.template_time_ms <= MAX_TEMPLATE_TIME_MS:
        raise InvalidRequest.of(
            "continuation.template_time_ms", given.template_time_ms, f"0 to {MAX_TEMPLATE_TIME_MS}"
        )
    seen: set[int] = set()
    choices: list[GivenChoice] = []
    for position, choice in enumerate(given.choices):
        field = f"continuation.choices[{position}]"
        if choice.index >= num_choices or choice.index in seen:
            raise InvalidRequest.of(
                f"{field}.index", choice.index, f"each index below n, which is {num_choices}, once"
            )
        seen.add(choice.index)
        choices.append(_given_choice(choice, field, spec))
    return Resumption(given.request_id, given.prompt_digest, given.template_time_ms, tuple(choices))


def _given_choice(choice: pb.ContinuedChoice, field: str, spec: ModelSpec) -> GivenChoice:
    check_token_ids(f"{field}.token_ids", choice.token_ids, spec.vocab_size)
    if choice.finish_reason not in _END_FROM_WIRE:
        raise InvalidRequest.of(
            f"{field}.finish_reason", choice.finish_reason, "a value of FinishReason"
        )
    return GivenChoice(choice.index, tuple(choice.token_ids), _END_FROM_WIRE[choice.finish_reason])


# -- responses ------------------------------------------------------------------------------------


def generate_response(update: StreamUpdate) -> pb.GenerateResponse:
    """Build one message of a stream."""
    return pb.GenerateResponse(
        started=_started(update.started) if update.started is not None else None,
        outputs=[_output(output) for output in update.outputs],
        finished=[_finished(end) for end in update.ended],
        prompt_logprobs=_logprobs(update.prompt_logprobs),
    )


def complete_response(
    started: Started,
    choices: Sequence[tuple[OutputDelta, ChoiceEnd]],
    prompt_logprobs: Sequence[TokenLogprobs],
) -> pb.CompleteResponse:
    """Build the whole answer from each choice's joined output and its end."""
    return pb.CompleteResponse(
        started=_started(started),
        choices=[
            pb.Choice(
                index=output.choice_index,
                text=output.text,
                reasoning_text=output.reasoning_text,
                token_ids=output.token_ids,
                logprobs=_logprobs(output.logprobs),
                finished=_finished(end),
            )
            for output, end in choices
        ],
        prompt_logprobs=_logprobs(prompt_logprobs),
    )


def model_message(spec: ModelSpec, has_chat_template: bool) -> pb.Model:
    """Build one entry of ListModels."""
    return pb.Model(
        name=spec.name,
        version=spec.version_digest,
        max_context_tokens=spec.max_context_tokens,
        vocab_size=spec.vocab_size,
        eos_token_ids=spec.eos_token_ids,
        has_chat_template=has_chat_template,
    )


def _started(started: Started) -> pb.Started:
    return pb.Started(
        request_id=started.request_id,
        model_version=started.model_version,
        seed=started.seed,
        num_prompt_tokens=started.num_prompt_tokens,
        num_cached_tokens=started.num_cached_tokens,
        prompt_digest=started.prompt_digest,
        template_time_ms=started.template_time_ms,
        resumed=started.is_resumed,
    )


def _output(output: OutputDelta) -> pb.Output:
    return pb.Output(
        choice_index=output.choice_index,
        token_offset=output.token_offset,
        token_ids=output.token_ids,
        text=output.text,
        reasoning_text=output.reasoning_text,
        logprobs=_logprobs(output.logprobs),
    )


def _logprobs(positions: Sequence[TokenLogprobs]) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(
            token_id=position.token_id,
            logprob=position.logprob,
            top=[pb.TopLogprob(token_id=i, logprob=value) for i, value in position.top],
        )
        for position in positions
    ]


def _finished(end: ChoiceEnd) -> pb.Finished:
    return pb.Finished(
        choice_index=end.choice_index,
        reason=_END_TO_WIRE[end.reason],
        stop_string=end.stop_string,
        usage=_usage(end.usage),
    )


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        cached_host_tokens=usage.cached_host_tokens,
        num_preemptions=usage.num_preemptions,
        queue_ms=usage.queue_s * 1000,
        prefill_ms=usage.prefill_s * 1000,
        decode_ms=usage.decode_s * 1000,
        tokens_per_second=usage.tokens_per_second,
    )
