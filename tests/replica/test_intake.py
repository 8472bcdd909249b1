"""From a Submission to a Request."""

import pytest

from rillgate_server.core.request import (
    ChoiceStart,
    PriorityClass,
    Rejection,
    RejectReason,
    Request,
    Speculation,
    Tenant,
)
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.submission import Submission
from rillgate_server.replica.intake import MAX_STOP_TOKEN_IDS, to_request
from tests.replica.engine_server import make_submission

EOS = (999, 998)


def taken(submission: Submission) -> Request:
    """Resolve one that is right."""
    request = to_request(submission, 7, EOS, 1.5)
    assert isinstance(request, Request)
    return request


def test_the_model_s_ends_join_the_stop_ids() -> None:
    """Unless the caller ignores them; its own ids always count."""
    assert taken(make_submission(stop_token_ids=(5,))).stop_token_ids == {5, 998, 999}
    ignoring = make_submission(stop_token_ids=(5,), ignore_eos=True)
    assert taken(ignoring).stop_token_ids == {5}


def test_min_tokens_bans_every_id_that_would_end_the_choice() -> None:
    """The sampler gets the same ids; without min_tokens nothing is banned."""
    waiting = make_submission(stop_token_ids=(5,), sampling=SamplingParams(seed=1, min_tokens=2))
    assert taken(waiting).sampling.banned_until_min_tokens == (5, 998, 999)
    assert taken(make_submission(stop_token_ids=(5,))).sampling.banned_until_min_tokens == ()


def test_the_rest_arrives_unchanged() -> None:
    """Id, arrival, choices and limits are those that were given."""
    choices = (ChoiceStart(2, (4, 5)), ChoiceStart(0))
    request = taken(make_submission(1, 2, choices=choices, max_tokens=9, cache_salt=b"s" * 16))
    assert (request.request_id, request.arrival_s) == (7, 1.5)
    assert request.prompt_token_ids == (1, 2)
    assert request.choices == choices
    assert (request.max_tokens, request.cache_salt) == (9, b"s" * 16)


def test_the_account_arrives_unchanged() -> None:
    """Tenant, class, salt and shared prefix are the gateway's to say."""
    request = taken(
        make_submission(
            tenant=Tenant("a", 2.0),
            priority=PriorityClass.LOW,
            speculation=Speculation.AUTO,
            num_shared_prefix_tokens=2,
        )
    )
    assert (request.tenant, request.priority) == (Tenant("a", 2.0), PriorityClass.LOW)
    assert request.num_shared_prefix_tokens == 2
    assert request.speculation is Speculation.AUTO


def test_times_are_put_on_this_replica_s_clock() -> None:
    """What it waited lies before now, what the caller still waits after; no deadline stays none."""
    request = taken(make_submission(waited_s=0.5, time_remaining_s=2.0))
    assert (request.arrival_s, request.deadline_s) == (1.0, 3.5)
    assert taken(make_submission()).deadline_s is None


@pytest.mark.parametrize(
    ("submission", "message"),
    [
        (make_submission(request_id="ä" * 65), "at most 128 bytes"),
        (make_submission(choices=()), "choices is 0; allowed: 1 to 64"),
        (make_submission(choices=tuple(map(ChoiceStart, range(65)))), "choices is 65"),
        (
            make_submission(choices=(ChoiceStart(3, (1,) * 9),)),
            r"choices\[3\].generated_token_ids is 9 tokens; allowed: at most max_tokens, 8",
        ),
        (
            make_submission(stop_token_ids=(1,) * (MAX_STOP_TOKEN_IDS + 1)),
            "stop_token_ids is 1025 ids; allowed: at most 1024 ids",
        ),
        (
            make_submission(
                *([1] * 25_000), sampling=SamplingParams(seed=1, num_prompt_logprobs=20)
            ),
            "num_prompt_logprobs is 525000 values .*; allowed: at most 524288 values",
        ),
    ],
)
def test_what_is_out_of_its_limits_is_refused_with_the_numbers(
    submission: Submission, message: str
) -> None:
    """Field, value and what is allowed, and never an exception."""
    rejection = to_request(submission, 1, EOS, 0.0)
    assert isinstance(rejection, Rejection)
    assert rejection.reason is RejectReason.INVALID
    with pytest.raises(ValueError, match=message):
        raise ValueError(rejection.message)
