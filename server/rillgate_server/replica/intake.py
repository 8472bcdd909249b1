"""Turns what a gateway submitted into a Request, or says why not.

A replica trusts no gateway: every value is checked against the model here, before the engine's
thread hears of it. Whether the request fits into cache and queue now is the scheduler's to say.
"""

from dataclasses import replace

from rillgate_server.core.model_spec import ModelSpec
from rillgate_server.core.request import Rejection, RejectReason, Request
from rillgate_server.core.sampling_params import MAX_CHOICES, SamplingParams
from rillgate_server.core.submission import MAX_REQUEST_ID_BYTES, Submission
from rillgate_server.errors import InvalidRequest

MAX_PROMPT_LOGPROB_VALUES = 1 << 22
"""Prompt positions times alternatives: about 8 bytes each, half of the largest message."""
MAX_STOP_TOKEN_IDS = 1024
"""Beside the model's own; a batch looks each sampled id up among them."""

_SALT_BYTES = 16


def to_request(
    submission: Submission, request_id: int, spec: ModelSpec, arrival_s: float
) -> Request | Rejection:
    """Check `submission` against the model and resolve it; never raises."""
    try:
        _check_tokens(submission, spec)
        _check_limits(submission)
        submission.sampling.validate(spec.vocab_size)
        _check_logprobs(submission)
    except InvalidRequest as error:
        return Rejection(RejectReason.INVALID, str(error))
    num_tokens = len(submission.prompt_token_ids) + submission.max_tokens
    if num_tokens > spec.max_context_tokens:
        return Rejection(
            RejectReason.TOO_LONG,
            f"prompt of {len(submission.prompt_token_ids)} tokens and max_tokens of "
            f"{submission.max_tokens} make {num_tokens}; the context holds "
            f"{spec.max_context_tokens}",
            asked=num_tokens,
            limit=spec.max_context_tokens,
        )
    return _resolved(submission, request_id, spec, arrival_s)


def _resolved(
    submission: Submission, request_id: int, spec: ModelSpec, arrival_s: float
) -> Request:
    """Join the model's own ends to the stop ids, and ban them all before min_tokens."""
    stop_token_ids = frozenset(submission.stop_token_ids)
    if not submission.ignore_eos:
        stop_token_ids |= frozenset(spec.eos_token_ids)
    return Request(
        request_id=request_id,
        prompt_token_ids=submission.prompt_token_ids,
        choices=submission.choices,
        sampling=_with_banned(submission.sampling, stop_token_ids),
        max_tokens=submission.max_tokens,
        stop_token_ids=stop_token_ids,
        cache_salt=submission.cache_salt,
        arrival_s=arrival_s,
    )


def _with_banned(sampling: SamplingParams, stop_token_ids: frozenset[int]) -> SamplingParams:
    if sampling.min_tokens == 0:
        return sampling
    return replace(sampling, banned_until_min_tokens=tuple(sorted(stop_token_ids)))


def _check_tokens(submission: Submission, spec: ModelSpec) -> None:
    if not submission.prompt_token_ids:
        raise InvalidRequest.of("prompt_token_ids", "empty", "at least one token")
    if not 1 <= len(submission.choices) <= MAX_CHOICES:
        raise InvalidRequest.of("choices", len(submission.choices), f"1 to {MAX_CHOICES}")
    indices = [choice.index for choice in submission.choices]
    if len(set(indices)) != len(indices):
        raise InvalidRequest.of("choices.index", indices, "distinct indices")
    if len(submission.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest.of(
            "stop_token_ids", f"{len(submission.stop_token_ids)} ids", f"up to {MAX_STOP_TOKEN_IDS}"
        )
    for field, token_ids in (
        ("prompt_token_ids", submission.prompt_token_ids),
        ("stop_token_ids", submission.stop_token_ids),
        *(("choices.generated_token_ids", it.generated_token_ids) for it in submission.choices),
    ):
        largest = max(token_ids, default=0)
        if largest >= spec.vocab_size:
            raise InvalidRequest.of(field, f"token {largest}", f"token ids below {spec.vocab_size}")


def _check_limits(submission: Submission) -> None:
    if submission.max_tokens < 1:
        raise InvalidRequest.of("max_tokens", submission.max_tokens, "at least 1")
    if submission.sampling.min_tokens > submission.max_tokens:
        raise InvalidRequest.of(
            "min_tokens",
            submission.sampling.min_tokens,
            f"at most max_tokens, {submission.max_tokens}",
        )
    for choice in submission.choices:
        if len(choice.generated_token_ids) >= submission.max_tokens:
            raise InvalidRequest.of(
                "choices.generated_token_ids",
                f"{len(choice.generated_token_ids)} tokens",
                f"fewer than max_tokens, {submission.max_tokens}",
            )
    if len(submission.cache_salt) != _SALT_BYTES:
        raise InvalidRequest.of(
            "cache_salt", f"{len(submission.cache_salt)} bytes", f"{_SALT_BYTES} bytes, or none"
        )
    if len(submission.request_id.encode()) > MAX_REQUEST_ID_BYTES:
        raise InvalidRequest.of(
            "request_id", submission.request_id, f"{MAX_REQUEST_ID_BYTES} bytes"
        )


def _check_logprobs(submission: Submission) -> None:
    """Keep a prompt's log-probabilities, which leave all at once, inside one message."""
    num_top = submission.sampling.num_prompt_logprobs
    if num_top is None:
        return
    num_values = len(submission.prompt_token_ids) * (num_top + 1)
    if num_values > MAX_PROMPT_LOGPROB_VALUES:
        raise InvalidRequest.of(
            "num_prompt_logprobs",
            f"{num_values} values (prompt tokens × alternatives)",
            f"at most {MAX_PROMPT_LOGPROB_VALUES}",
        )
