"""A step as bytes, for the ranks of a split model: the plan down, each rank's report up.

JSON arrays in the order of the dataclasses' fields: explicit, so that nothing but a plan can come
out of bytes (pickle would run what a stranger on the network sends), and quick, because Python's
own encoder and decoder are in C. Does not know how the bytes travel.

    plan     [step_id, starts, rows, ended_slots, copies, sampled]
    report   [step_id, failure, num_collectives, finished_copies]
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import (
    CopyDirection,
    CopyDone,
    CopyJob,
    RowPlan,
    SlotStart,
    StepPlan,
    StepResult,
)
from rillgate_server.errors import EngineFailure

STEP_FORMAT = 2
"""Of these bytes; all ranks of a model must speak the same."""

SampledTokens = tuple[tuple[int, int], ...]
"""(slot, token id) of the tokens that a step sampled."""


@dataclass(frozen=True, slots=True)
class RankReport:
    """What a rank says of one plan."""

    step_id: int
    failure: str = ""
    """Why the step raised; empty when it did not."""
    num_collectives: int = 0
    """That this rank has entered since its start: equal counts stopped at the same place."""
    finished_copies: tuple[CopyDone, ...] = ()


def sampled_tokens(plan: StepPlan, result: StepResult) -> SampledTokens:
    """Return what the ranks that do not sample must note before the next plan."""
    slots = [row.slot for row in plan.rows if row.samples]
    return tuple(
        (slot, token_id)
        for slot, token_ids in zip(slots, result.token_ids, strict=True)
        for token_id in token_ids
    )


def encode_plan(plan: StepPlan, sampled: SampledTokens = ()) -> bytes:
    """Encode a plan, and the tokens that the step before it sampled."""
    return _encode(
        [
            plan.step_id,
            [_start_values(start) for start in plan.starts],
            [_row_values(row) for row in plan.rows],
            plan.ended_slots,
            [_job_values(job) for job in plan.copies],
            sampled,
        ]
    )


def decode_plan(data: bytes) -> tuple[StepPlan, SampledTokens]:
    """Decode what `encode_plan` made. Raises EngineFailure for anything else."""
    try:
        step_id, starts, rows, ended_slots, copies, sampled = json.loads(data)
        plan = StepPlan(
            step_id,
            tuple(map(_start, starts)),
            tuple(map(_row, rows)),
            tuple(ended_slots),
            tuple(map(_job, copies)),
        )
        return plan, tuple((slot, token_id) for slot, token_id in sampled)
    except (ValueError, TypeError) as error:
        raise EngineFailure(f"{len(data)} bytes are no plan: {error}") from error


def encode_report(report: RankReport) -> bytes:
    """Encode a rank's report."""
    return _encode(
        [
            report.step_id,
            report.failure,
            report.num_collectives,
            [_done_values(done) for done in report.finished_copies],
        ]
    )


def decode_report(data: bytes) -> RankReport:
    """Decode what `encode_report` made. Raises EngineFailure for anything else."""
    try:
        step_id, failure, num_collectives, finished = json.loads(data)
        return RankReport(step_id, failure, num_collectives, tuple(map(_done, finished)))
    except (ValueError, TypeError) as error:
        raise EngineFailure(f"{len(data)} bytes are no report: {error}") from error


def _encode(values: Sequence[object]) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode()


def _start_values(start: SlotStart) -> list[object]:
    return [
        start.slot,
        start.token_ids,
        start.num_prompt_tokens,
        start.block_table,
        _sampling_values(start.sampling),
        start.choice_index,
    ]


def _start(values: Any) -> SlotStart:  # JSON's own values, as in all that follow
    slot, token_ids, num_prompt_tokens, block_table, sampling, choice_index = values
    return SlotStart(
        slot,
        tuple(token_ids),
        num_prompt_tokens,
        tuple(block_table),
        _sampling(sampling),
        choice_index,
    )


def _sampling_values(params: SamplingParams) -> list[object]:
    return [
        params.seed,
        params.temperature,
        params.top_p,
        params.top_k,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        params.logit_bias,
        params.min_tokens,
        params.banned_until_min_tokens,
        params.num_logprobs,
        params.num_prompt_logprobs,
    ]


def _sampling(values: Any) -> SamplingParams:
    params = SamplingParams(*values)
    return replace(
        params,
        logit_bias=tuple((token_id, bias) for token_id, bias in params.logit_bias),
        banned_until_min_tokens=tuple(params.banned_until_min_tokens),
    )


def _row_values(row: RowPlan) -> list[object]:
    return [
        row.slot,
        row.start,
        row.num_tokens,
        row.new_blocks,
        row.samples,
        row.prompt_logprobs,
        row.draft_token_ids,
        row.num_proposals,
    ]


def _row(values: Any) -> RowPlan:
    slot, start, num_tokens, new_blocks, samples, prompt_logprobs, drafts, num_proposals = values
    return RowPlan(
        slot,
        start,
        num_tokens,
        tuple(new_blocks),
        samples,
        prompt_logprobs,
        tuple(drafts),
        num_proposals,
    )


def _job_values(job: CopyJob) -> list[object]:
    return [job.copy_id, job.direction.value, job.pairs, job.checksums]


def _job(values: Any) -> CopyJob:
    copy_id, direction, pairs, checksums = values
    return CopyJob(
        copy_id,
        CopyDirection(direction),
        tuple((source, target) for source, target in pairs),
        None if checksums is None else tuple(checksums),
    )


def _done_values(done: CopyDone) -> list[object]:
    return [
        done.copy_id,
        done.failed_pairs,
        done.num_bytes,
        done.seconds,
        done.checksums,
        done.message,
        done.num_refused,
    ]


def _done(values: Any) -> CopyDone:
    copy_id, failed_pairs, num_bytes, seconds, checksums, message, num_refused = values
    return CopyDone(
        copy_id, tuple(failed_pairs), num_bytes, seconds, tuple(checksums), message, num_refused
    )
