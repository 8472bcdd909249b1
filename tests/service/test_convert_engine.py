"""Core's types survive the wire."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rillgate_proto.v1 import engine_pb2
from rillgate_server.core.request import (
    ChoiceStart,
    FinishReason,
    PriorityClass,
    Rejection,
    RejectReason,
    RequestRejected,
    Speculation,
    Tenant,
)
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import (
    ChoiceFinished,
    ChoiceTokens,
    PromptLogprobs,
    RequestFailed,
    RequestStarted,
    StepOutput,
    TokenLogprobs,
)
from rillgate_server.core.submission import Submission
from rillgate_server.service import convert_engine

# No example has a deadline: the machine may be busy.
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
doubles = st.floats(allow_nan=False)
floats = st.floats(allow_nan=False, width=32)
token_ids = st.lists(u32, max_size=8).map(tuple)
text = st.text(st.characters(codec="utf-8"), max_size=20)
counts = st.none() | st.integers(0, 20)
# What the wire carries in milliseconds is compared to within rounding of the last bit.
seconds = st.integers(0, 10**6).map(lambda ms: ms / 1e3)

samplings = st.builds(
    SamplingParams,
    seed=u64,
    temperature=doubles,
    top_p=doubles,
    top_k=u32,
    min_p=doubles,
    repetition_penalty=doubles,
    presence_penalty=doubles,
    frequency_penalty=doubles,
    logit_bias=st.dictionaries(u32, doubles, max_size=4).map(lambda it: tuple(sorted(it.items()))),
    min_tokens=u32,
    banned_until_min_tokens=st.just(()),
    num_logprobs=counts,
    num_prompt_logprobs=counts,
)
submissions = st.builds(
    Submission,
    request_id=text,
    prompt_token_ids=token_ids,
    sampling=samplings,
    max_tokens=u32,
    choices=st.lists(st.builds(ChoiceStart, u32, token_ids), max_size=4).map(tuple),
    stop_token_ids=token_ids,
    ignore_eos=st.booleans(),
    cache_salt=st.binary(min_size=16, max_size=16),
    num_shared_prefix_tokens=u32,
    tenant=st.builds(Tenant, text, st.floats(min_value=0, exclude_min=True)),
    priority=st.sampled_from(PriorityClass),
    speculation=st.none() | st.sampled_from(Speculation),
    time_remaining_s=st.none() | seconds.filter(bool),
    waited_s=seconds,
)
positions = st.lists(
    st.builds(TokenLogprobs, u32, floats, st.lists(st.tuples(u32, floats), max_size=3).map(tuple)),
    min_size=1,
    max_size=3,
).map(tuple)
tuples_of = {
    "started": st.builds(
        lambda key, wait_s, device, host: RequestStarted(key, wait_s, device + host, host),
        *(u64, seconds, st.integers(0, 2**31), st.integers(0, 2**31)),
    ),
    "tokens": st.builds(ChoiceTokens, u64, u32, u32, token_ids, st.just(()) | positions),
    "prompt_logprobs": st.builds(PromptLogprobs, u64, positions),
    "finished": st.builds(ChoiceFinished, u64, u32, st.sampled_from(FinishReason), u32, u32),
    "failed": st.builds(RequestFailed, u64, text),
}
outputs = st.builds(
    StepOutput,
    step_id=u64,
    **{name: st.lists(items, max_size=4).map(tuple) for name, items in tuples_of.items()},
)


@settings(deadline=None)
@given(u64, submissions)
def test_a_submission_survives_the_wire(key: int, submission: Submission) -> None:
    """Key and every field arrive as they were, values out of any range included."""
    data = convert_engine.submit_command(key, submission).SerializeToString()
    submit = engine_pb2.EngineCommand.FromString(data).submit
    assert submit.request_key == key
    assert convert_engine.submission_from_wire(submit) == submission


@settings(deadline=None)
@given(outputs)
def test_a_step_output_survives_the_wire(output: StepOutput) -> None:
    """Parallel arrays unpack into the entries that went in; logprobs find their entry."""
    data = convert_engine.step_output_event(output).SerializeToString()
    arrived = convert_engine.step_output_from_wire(
        engine_pb2.EngineEvent.FromString(data).step_output
    )
    assert [it.queue_s for it in arrived.started] == pytest.approx(
        [it.queue_s for it in output.started]
    )
    started = tuple(replace(it, queue_s=0.0) for it in output.started)
    assert replace(arrived, started=()) == replace(output, started=())
    assert tuple(replace(it, queue_s=0.0) for it in arrived.started) == started


@settings(deadline=None)
@given(
    u64,
    st.builds(
        Rejection,
        reason=st.sampled_from(RejectReason),
        message=text,
        asked=u64,
        free=u64,
        limit=u64,
        retry_after_s=seconds,
        predicted_ttft_s=seconds,
    ),
)
def test_a_rejection_survives_the_wire(key: int, rejection: Rejection) -> None:
    """Each reason has its number, and the numbers of the message arrive."""
    data = convert_engine.rejected_event(RequestRejected(key, rejection)).SerializeToString()
    rejected = engine_pb2.EngineEvent.FromString(data).rejected
    assert convert_engine.rejected_from_wire(rejected) == RequestRejected(key, rejection)


def test_a_deadline_that_is_over_does_not_become_none() -> None:
    """0 on the wire means no deadline, so the least that is sent is a millisecond."""
    submission = Submission("r", (1,), SamplingParams(1), 1, time_remaining_s=0.0)
    submit = convert_engine.submit_command(1, submission).submit
    assert convert_engine.submission_from_wire(submit).time_remaining_s == 0.001


def test_a_priority_of_a_newer_gateway_is_normal() -> None:
    """Unset and unknown numbers do not end the stream of all requests."""
    assert convert_engine.priority_from_wire(0) is PriorityClass.NORMAL
    assert convert_engine.priority_from_wire(99) is PriorityClass.NORMAL


def test_every_reason_of_the_wire_has_one_of_core() -> None:
    """No enum has a number without a meaning, but UNSPECIFIED, nor a meaning without one."""
    assert len(engine_pb2.EnginePriority.values()) == len(PriorityClass) + 1
    assert len(engine_pb2.RejectReason.values()) == len(RejectReason) + 1
    assert len(engine_pb2.EngineFinishReason.values()) == len(FinishReason) + 1


def test_an_abort_names_request_and_choices() -> None:
    """Key and indices arrive; no index means all."""
    command = convert_engine.abort_command(7, (2, 0))
    assert (command.abort.request_key, tuple(command.abort.choice_indices)) == (7, (2, 0))
    assert tuple(convert_engine.abort_command(7).abort.choice_indices) == ()
