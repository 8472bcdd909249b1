"""From the answers of Inference to the client's plain values.

Owns the translation of each message. Knows nothing of what a stream adds up to: `_accumulate`; the
answers of Control are `_convert_status`'s.
"""

from collections.abc import Iterable

from rillgate.errors import ProtocolError
from rillgate.types import (
    Choice,
    FinishReason,
    Generation,
    ModelInfo,
    Started,
    Tokenization,
    TokenLogprobs,
    Usage,
)
from rillgate_proto.v1 import inference_pb2

_REASONS = {
    int(inference_pb2.FINISH_REASON_STOP): FinishReason.STOP,
    int(inference_pb2.FINISH_REASON_LENGTH): FinishReason.LENGTH,
    int(inference_pb2.FINISH_REASON_STOP_STRING): FinishReason.STOP_STRING,
    int(inference_pb2.FINISH_REASON_DEADLINE): FinishReason.DEADLINE,
}


def to_started(message: inference_pb2.Started) -> Started:
    """Translate."""
    return Started(
        request_id=message.request_id,
        model_version=message.model_version,
        seed=message.seed,
        num_prompt_tokens=message.num_prompt_tokens,
        num_cached_tokens=message.num_cached_tokens,
        prompt_digest=message.prompt_digest,
        template_time_ms=message.template_time_ms,
        resumed=message.resumed,
    )


def to_reason(reason: int) -> FinishReason:
    """Translate; a reason that this client does not know is UNKNOWN."""
    return _REASONS.get(int(reason), FinishReason.UNKNOWN)


def to_usage(message: inference_pb2.Usage) -> Usage:
    """Translate."""
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_tokens=message.cached_tokens,
        num_preemptions=message.num_preemptions,
        queue_ms=message.queue_ms,
        prefill_ms=message.prefill_ms,
        decode_ms=message.decode_ms,
        tokens_per_second=message.tokens_per_second,
        cached_host_tokens=message.cached_host_tokens,
    )


def to_logprobs(messages: Iterable[inference_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    """Translate."""
    return tuple(
        TokenLogprobs(
            message.token_id,
            message.logprob,
            tuple((top.token_id, top.logprob) for top in message.top),
        )
        for message in messages
    )


def to_generation(message: inference_pb2.CompleteResponse) -> Generation:
    """Translate; raise ProtocolError when it holds no choice."""
    if not message.choices:
        raise ProtocolError("the answer holds no choice")
    return Generation(
        started=to_started(message.started),
        choices=tuple(map(_to_choice, message.choices)),
        prompt_logprobs=to_logprobs(message.prompt_logprobs),
    )


def _to_choice(message: inference_pb2.Choice) -> Choice:
    return Choice(
        index=message.index,
        text=message.text,
        reasoning_text=message.reasoning_text,
        token_ids=tuple(message.token_ids),
        logprobs=to_logprobs(message.logprobs),
        finish_reason=to_reason(message.finished.reason),
        stop_string=message.finished.stop_string,
        usage=to_usage(message.finished.usage),
    )


def to_tokenization(message: inference_pb2.TokenizeResponse) -> Tokenization:
    """Translate."""
    return Tokenization(tuple(message.token_ids), message.max_context_tokens)


def to_models(message: inference_pb2.ListModelsResponse) -> tuple[ModelInfo, ...]:
    """Translate."""
    return tuple(
        ModelInfo(
            name=model.name,
            version=model.version,
            max_context_tokens=model.max_context_tokens,
            vocab_size=model.vocab_size,
            eos_token_ids=tuple(model.eos_token_ids),
            has_chat_template=model.has_chat_template,
        )
        for model in message.models
    )
