"""A Run stream's messages of engine.proto to and from core's plain types, for both sides.

Owns that mapping alone: it checks nothing (the replica's intake does) and knows no stream; what a
replica says of itself is convert_replica's. On the wire a request is named by its `request_key`;
the same number stands in `request_id` of core's events, and who holds the stream translates.
"""

from collections.abc import Iterable, Sequence

from rillgate_proto.v1 import engine_pb2
from rillgate_server.core.request import (
    NO_SALT,
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

MAX_MESSAGE_BYTES = 64 << 20
"""Of an engine message, either way (contracts, section 2)."""

_FINISH_TO_WIRE = {
    FinishReason.STOP: engine_pb2.ENGINE_FINISH_REASON_STOP,
    FinishReason.LENGTH: engine_pb2.ENGINE_FINISH_REASON_LENGTH,
}
_FINISH_FROM_WIRE = {wire: reason for reason, wire in _FINISH_TO_WIRE.items()}

_REJECT_TO_WIRE = {
    RejectReason.INVALID: engine_pb2.REJECT_REASON_INVALID,
    RejectReason.TOO_LONG: engine_pb2.REJECT_REASON_TOO_LONG,
    RejectReason.OVERLOADED: engine_pb2.REJECT_REASON_OVERLOADED,
    RejectReason.DEADLINE_NEVER: engine_pb2.REJECT_REASON_DEADLINE_NEVER,
    RejectReason.DEADLINE_NOW: engine_pb2.REJECT_REASON_DEADLINE_NOW,
    RejectReason.DRAINING: engine_pb2.REJECT_REASON_DRAINING,
    RejectReason.NO_DRAFT_MODEL: engine_pb2.REJECT_REASON_NO_DRAFT_MODEL,
}
_REJECT_FROM_WIRE = {wire: reason for reason, wire in _REJECT_TO_WIRE.items()}

PRIORITY_TO_WIRE = {
    PriorityClass.HIGH: engine_pb2.ENGINE_PRIORITY_HIGH,
    PriorityClass.NORMAL: engine_pb2.ENGINE_PRIORITY_NORMAL,
    PriorityClass.LOW: engine_pb2.ENGINE_PRIORITY_LOW,
}
_PRIORITY_FROM_WIRE: dict[int, PriorityClass] = {
    wire: priority for priority, wire in PRIORITY_TO_WIRE.items()
}
_SPECULATION_TO_WIRE = {
    None: engine_pb2.ENGINE_SPECULATION_UNSPECIFIED,
    Speculation.OFF: engine_pb2.ENGINE_SPECULATION_OFF,
    Speculation.PROMPT_LOOKUP: engine_pb2.ENGINE_SPECULATION_PROMPT_LOOKUP,
    Speculation.DRAFT_MODEL: engine_pb2.ENGINE_SPECULATION_DRAFT_MODEL,
    Speculation.AUTO: engine_pb2.ENGINE_SPECULATION_AUTO,
}
_SPECULATION_FROM_WIRE: dict[int, Speculation | None] = {
    wire: method for method, wire in _SPECULATION_TO_WIRE.items()
}


def priority_from_wire(priority: int) -> PriorityClass:
    """Read a priority class; one that this version does not know is normal, as an unset one is."""
    return _PRIORITY_FROM_WIRE.get(int(priority), PriorityClass.NORMAL)


# -- commands -------------------------------------------------------------------------------------


def submit_command(request_key: int, submission: Submission) -> engine_pb2.EngineCommand:
    """Build the command that hands a request to a replica."""
    sampling = submission.sampling
    return engine_pb2.EngineCommand(
        submit=engine_pb2.Submit(
            request_key=request_key,
            request_id=submission.request_id,
            cache_salt=b"" if submission.cache_salt == NO_SALT else submission.cache_salt,
            prompt_token_ids=submission.prompt_token_ids,
            choices=[
                engine_pb2.SubmitChoice(
                    index=choice.index, generated_token_ids=choice.generated_token_ids
                )
                for choice in submission.choices
            ],
            sampling=_sampling_to_wire(sampling),
            max_tokens=submission.max_tokens,
            min_tokens=sampling.min_tokens,
            stop_token_ids=submission.stop_token_ids,
            ignore_eos=submission.ignore_eos,
            num_logprobs=sampling.num_logprobs,
            num_prompt_logprobs=sampling.num_prompt_logprobs,
            tenant=submission.tenant.name,
            tenant_weight=submission.tenant.weight,
            priority_class=PRIORITY_TO_WIRE[submission.priority],
            shared_prefix_tokens=submission.num_shared_prefix_tokens,
            time_remaining_ms=_time_remaining_ms(submission.time_remaining_s),
            waited_ms=round(submission.waited_s * 1e3),
            speculation=_SPECULATION_TO_WIRE[submission.speculation],
        )
    )


def _time_remaining_ms(time_remaining_s: float | None) -> int:
    """Return whole milliseconds; at least 1, since 0 means that there is no deadline."""
    return 0 if time_remaining_s is None else max(1, round(time_remaining_s * 1e3))


def abort_command(request_key: int, choice_indices: Iterable[int] = ()) -> engine_pb2.EngineCommand:
    """Build the command that ends a request, or some of its choices."""
    return engine_pb2.EngineCommand(
        abort=engine_pb2.Abort(request_key=request_key, choice_indices=choice_indices)
    )


def submission_from_wire(submit: engine_pb2.Submit) -> Submission:
    """Read a Submit, right or wrong: nothing is checked here."""
    return Submission(
        request_id=submit.request_id,
        prompt_token_ids=tuple(submit.prompt_token_ids),
        sampling=_sampling_from_wire(submit),
        max_tokens=submit.max_tokens,
        choices=tuple(
            ChoiceStart(choice.index, tuple(choice.generated_token_ids))
            for choice in submit.choices
        ),
        stop_token_ids=tuple(submit.stop_token_ids),
        ignore_eos=submit.ignore_eos,
        cache_salt=submit.cache_salt or NO_SALT,
        num_shared_prefix_tokens=submit.shared_prefix_tokens,
        tenant=Tenant(submit.tenant, submit.tenant_weight or 1.0),
        priority=priority_from_wire(submit.priority_class),
        time_remaining_s=submit.time_remaining_ms / 1e3 if submit.time_remaining_ms else None,
        waited_s=submit.waited_ms / 1e3,
        # One that this version does not know changes no token either: as the replica is set.
        speculation=_SPECULATION_FROM_WIRE.get(int(submit.speculation)),
    )


def _sampling_to_wire(sampling: SamplingParams) -> engine_pb2.EngineSampling:
    return engine_pb2.EngineSampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
    )


def _sampling_from_wire(submit: engine_pb2.Submit) -> SamplingParams:
    sampling = submit.sampling
    return SamplingParams(
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        min_tokens=submit.min_tokens,
        num_logprobs=submit.num_logprobs if submit.HasField("num_logprobs") else None,
        num_prompt_logprobs=(
            submit.num_prompt_logprobs if submit.HasField("num_prompt_logprobs") else None
        ),
    )


# -- events ---------------------------------------------------------------------------------------


def step_output_event(output: StepOutput) -> engine_pb2.EngineEvent:
    """Pack one step's output into parallel arrays; request ids in it are request keys."""
    tokens = output.tokens
    return engine_pb2.EngineEvent(
        step_output=engine_pb2.StepOutput(
            step_id=output.step_id,
            request_key=[entry.request_id for entry in tokens],
            choice_index=[entry.choice_index for entry in tokens],
            token_offset=[entry.token_offset for entry in tokens],
            num_tokens=[len(entry.token_ids) for entry in tokens],
            token_ids=[token_id for entry in tokens for token_id in entry.token_ids],
            logprobs=_logprobs_to_wire(output),
            started=[
                engine_pb2.RequestStarted(
                    request_key=started.request_id,
                    queue_ms=started.queue_s * 1e3,
                    cached_device_tokens=(
                        started.num_cached_tokens - started.num_cached_host_tokens
                    ),
                    cached_host_tokens=started.num_cached_host_tokens,
                )
                for started in output.started
            ],
            finished=[
                engine_pb2.ChoiceFinished(
                    request_key=finished.request_id,
                    choice_index=finished.choice_index,
                    reason=_FINISH_TO_WIRE[finished.reason],
                    num_tokens=finished.num_tokens,
                    num_preemptions=finished.num_preemptions,
                )
                for finished in output.finished
            ],
            failed=[
                engine_pb2.RequestFailed(request_key=failed.request_id, message=failed.message)
                for failed in output.failed
            ],
        )
    )


def rejected_event(rejected: RequestRejected) -> engine_pb2.EngineEvent:
    """Build the answer to a request that was not taken on."""
    rejection = rejected.rejection
    return engine_pb2.EngineEvent(
        rejected=engine_pb2.Rejected(
            request_key=rejected.request_id,
            reason=_REJECT_TO_WIRE[rejection.reason],
            asked=rejection.asked,
            free=rejection.free,
            limit=rejection.limit,
            retry_after_ms=round(rejection.retry_after_s * 1e3),
            message=rejection.message,
            predicted_ttft_ms=round(rejection.predicted_ttft_s * 1e3),
        )
    )


def step_output_from_wire(message: engine_pb2.StepOutput) -> StepOutput:
    """Unpack a step's output; request ids in it are request keys."""
    logprobs_by_entry: dict[int, tuple[TokenLogprobs, ...]] = {}
    prompt_logprobs: list[PromptLogprobs] = []
    for item in message.logprobs:
        positions = tuple(map(_position_from_wire, item.positions))
        if item.HasField("entry"):
            logprobs_by_entry[item.entry] = positions
        else:
            prompt_logprobs.append(PromptLogprobs(item.request_key, positions))
    return StepOutput(
        step_id=message.step_id,
        started=tuple(
            RequestStarted(
                item.request_key,
                item.queue_ms / 1e3,
                item.cached_device_tokens + item.cached_host_tokens,
                item.cached_host_tokens,
            )
            for item in message.started
        ),
        tokens=_tokens_from_wire(message, logprobs_by_entry),
        prompt_logprobs=tuple(prompt_logprobs),
        finished=tuple(
            ChoiceFinished(
                item.request_key,
                item.choice_index,
                _FINISH_FROM_WIRE[item.reason],
                item.num_tokens,
                item.num_preemptions,
            )
            for item in message.finished
        ),
        failed=tuple(RequestFailed(item.request_key, item.message) for item in message.failed),
    )


def rejected_from_wire(message: engine_pb2.Rejected) -> RequestRejected:
    """Read a refusal."""
    return RequestRejected(
        message.request_key,
        Rejection(
            reason=_REJECT_FROM_WIRE[message.reason],
            message=message.message,
            asked=message.asked,
            free=message.free,
            limit=message.limit,
            retry_after_s=message.retry_after_ms / 1e3,
            predicted_ttft_s=message.predicted_ttft_ms / 1e3,
        ),
    )


def _logprobs_to_wire(output: StepOutput) -> list[engine_pb2.EntryLogprobs]:
    of_tokens = [
        engine_pb2.EntryLogprobs(entry=entry, positions=_positions_to_wire(tokens.logprobs))
        for entry, tokens in enumerate(output.tokens)
        if tokens.logprobs
    ]
    of_prompts = [
        engine_pb2.EntryLogprobs(
            request_key=prompt.request_id, positions=_positions_to_wire(prompt.positions)
        )
        for prompt in output.prompt_logprobs
    ]
    return of_tokens + of_prompts


def _positions_to_wire(
    positions: Sequence[TokenLogprobs],
) -> list[engine_pb2.EngineTokenLogprobs]:
    return [
        engine_pb2.EngineTokenLogprobs(
            token_id=position.token_id,
            logprob=position.logprob,
            top_token_ids=[token_id for token_id, _ in position.top],
            top_logprobs=[logprob for _, logprob in position.top],
        )
        for position in positions
    ]


def _position_from_wire(position: engine_pb2.EngineTokenLogprobs) -> TokenLogprobs:
    top = tuple(zip(position.top_token_ids, position.top_logprobs, strict=True))
    return TokenLogprobs(position.token_id, position.logprob, top)


def _tokens_from_wire(
    message: engine_pb2.StepOutput, logprobs_by_entry: dict[int, tuple[TokenLogprobs, ...]]
) -> tuple[ChoiceTokens, ...]:
    token_ids = tuple(message.token_ids)
    entries: list[ChoiceTokens] = []
    end = 0
    for entry, (key, choice_index, token_offset, num_tokens) in enumerate(
        zip(
            message.request_key,
            message.choice_index,
            message.token_offset,
            message.num_tokens,
            strict=True,
        )
    ):
        start, end = end, end + num_tokens
        logprobs = logprobs_by_entry.get(entry, ())
        entries.append(
            ChoiceTokens(key, choice_index, token_offset, token_ids[start:end], logprobs)
        )
    return tuple(entries)
