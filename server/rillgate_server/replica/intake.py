"""Turns what a gateway submitted into the engine's Request, or says why not.

Owns what only this side of the door knows: the model's own ends of sequence, and the limits that
keep messages and books small. Whether the values suit the model, the cache and the queue is the
scheduler's to say (scheduler.admission), which trusts no gateway either.
"""

from dataclasses import replace

from rillgate_server.core.request import Rejection, RejectReason, Request
from rillgate_server.core.sampling_params import MAX_CHOICES
from rillgate_server.core.submission import MAX_REQUEST_ID_BYTES, Submission
from rillgate_server.errors import InvalidRequest

MAX_PROMPT_LOGPROB_VALUES = 1 << 19
"""Prompt positions times alternatives, which leave in one message. Measured at 21 a position: 400
bytes each while they are gathered (210 MB in all), and 1 us each to pack on the I/O thread, whose
Loads must not pause for a second."""
MAX_STOP_TOKEN_IDS = 1024
"""Beside the model's own. Before min_tokens each is banned in every step."""


def to_request(
    submission: Submission, request_id: int, eos_token_ids: tuple[int, ...], now_s: float
) -> Request | Rejection:
    """Check and resolve `submission`, which came at `now_s`; never raises."""
    remaining_s = submission.time_remaining_s
    try:
        _check_sizes(submission)
        _check_choices(submission)
    except InvalidRequest as error:
        return Rejection(RejectReason.INVALID, str(error))
    stop_token_ids = frozenset(submission.stop_token_ids)
    if not submission.ignore_eos:
        stop_token_ids |= frozenset(eos_token_ids)
    sampling = submission.sampling
    if sampling.min_tokens > 0:
        sampling = replace(sampling, banned_until_min_tokens=tuple(sorted(stop_token_ids)))
    return Request(
        request_id=request_id,
        prompt_token_ids=submission.prompt_token_ids,
        choices=submission.choices,
        sampling=sampling,
        max_tokens=submission.max_tokens,
        stop_token_ids=stop_token_ids,
        cache_salt=submission.cache_salt,
        num_shared_prefix_tokens=submission.num_shared_prefix_tokens,
        tenant=submission.tenant,
        priority=submission.priority,
        speculation=submission.speculation,
        arrival_s=now_s - submission.waited_s,
        deadline_s=None if remaining_s is None else now_s + remaining_s,
    )


def _check_sizes(submission: Submission) -> None:
    if len(submission.request_id.encode()) > MAX_REQUEST_ID_BYTES:
        raise InvalidRequest.of(
            "request_id", submission.request_id, f"at most {MAX_REQUEST_ID_BYTES} bytes"
        )
    if len(submission.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest.of(
            "stop_token_ids",
            f"{len(submission.stop_token_ids)} ids",
            f"at most {MAX_STOP_TOKEN_IDS} ids",
        )
    num_top = submission.sampling.num_prompt_logprobs
    num_values = 0 if num_top is None else len(submission.prompt_token_ids) * (num_top + 1)
    if num_values > MAX_PROMPT_LOGPROB_VALUES:
        raise InvalidRequest.of(
            "num_prompt_logprobs",
            f"{num_values} values (prompt tokens times alternatives)",
            f"at most {MAX_PROMPT_LOGPROB_VALUES} values",
        )


def _check_choices(submission: Submission) -> None:
    if not 1 <= len(submission.choices) <= MAX_CHOICES:
        raise InvalidRequest.of("choices", f"{len(submission.choices)}", f"1 to {MAX_CHOICES}")
    for choice in submission.choices:
        if len(choice.generated_token_ids) > submission.max_tokens:
            raise InvalidRequest.of(
                f"choices[{choice.index}].generated_token_ids",
                f"{len(choice.generated_token_ids)} tokens",
                f"at most max_tokens, {submission.max_tokens}",
            )
