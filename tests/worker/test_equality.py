"""Every architecture generates exactly what transformers' own `generate` gives, and planted faults
are seen.

The planner of tests.support makes the plans: chunked prefill beside decode rows, prefixes shared.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import SlotStart, StepPlan
from rillgate_server.worker.attention.base import AttentionStep
from rillgate_server.worker.attention.sdpa import SdpaAttention
from rillgate_server.worker.kv_tiers import reserve_tiers
from rillgate_server.worker.kv_transfer import KVTransfer
from rillgate_server.worker.model_runner import ModelRunner
from rillgate_server.worker.worker import Worker
from tests.support.checkpoints import KINDS, VOCAB_SIZE
from tests.support.equality import (
    NUM_TOKENS,
    PARENT,
    first_difference,
    logprob_error,
    mixed_prompts,
)
from tests.support.networks import PassingNetwork
from tests.support.planner import Executes, Job, Planner
from tests.support.reference import Reference, generate, load_reference
from tests.support.worker_fixtures import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    MakeCheckpoint,
    MakeReference,
    load_worker,
)

SAMPLING = SamplingParams(seed=0, temperature=0.0, num_logprobs=VOCAB_SIZE)
MAX_LOGPROB_ERROR = 2e-4
"""Float32 sums in another order; the kinds show 1e-5 to 4e-5."""

Fault = Callable[[StepPlan], StepPlan]


def mixed_jobs() -> list[Job]:
    """Make the mixed batch; one request enters per step, so that prefill meets decode."""
    return [
        Job(
            prompt,
            NUM_TOKENS,
            SAMPLING,
            starts_at_step=i,
            shares_with=PARENT if i % 2 and i > PARENT else None,
        )
        for i, prompt in enumerate(mixed_prompts())
    ]


def run_mixed(worker: Executes, fault: Fault = lambda plan: plan) -> tuple[list[Job], Planner]:
    """Run the mixed batch with small budgets."""
    jobs = mixed_jobs()
    planner = Planner(NUM_BLOCKS, BLOCK_SIZE, step_tokens=24, chunk=15)
    planner.run(worker, jobs, fault)
    return jobs, planner


def run_alone(worker: Executes, prompt: Sequence[int], given: Sequence[int] = ()) -> Job:
    """Run one request with a prefill in one chunk."""
    job = Job(prompt, NUM_TOKENS, SAMPLING, given=given)
    planner = Planner(NUM_BLOCKS, BLOCK_SIZE, step_tokens=1024, chunk=1024)
    planner.run(worker, [job])
    return job


def wrong_answers(worker: Worker, jobs: Sequence[Job], expected: Sequence[Reference]) -> list[int]:
    """List the indices of jobs whose tokens differ from the reference's."""

    def rerun(prompt: Sequence[int], given: Sequence[int]) -> list[int]:
        worker.allocate_cache(NUM_BLOCKS)
        return run_alone(worker, prompt, given).tokens

    return [
        i
        for i, (job, answer) in enumerate(zip(jobs, expected, strict=True))
        if first_difference(job.prompt, job.tokens, answer, rerun) is not None
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_another_context_changes_at_least_half_of_the_tokens(
    kind: str, reference: MakeReference
) -> None:
    """The reference's answers hang on their context: else equality would prove nothing."""
    model, _ = reference(kind)
    tail = [5, 6, 7]
    one, other = (generate(model, [*start, *tail], NUM_TOKENS) for start in ([9, 8], [30, 31]))
    changed = sum(a != b for a, b in zip(one.tokens, other.tokens, strict=True))
    assert changed >= NUM_TOKENS // 2
    assert len(set(one.tokens)) > NUM_TOKENS // 4


@pytest.mark.parametrize("kind", KINDS)
def test_alone_a_request_gets_the_tokens_and_logits_of_generate(
    kind: str, checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """Each of the 12 prompts, one after another on a fresh cache."""
    _, expected = reference(kind)
    worker = load_worker(checkpoint(kind))
    jobs = []
    for prompt in mixed_prompts():
        worker.allocate_cache(NUM_BLOCKS)
        jobs.append(run_alone(worker, prompt))
    assert wrong_answers(worker, jobs, expected) == []
    errors = [logprob_error(j.logprobs, e) for j, e in zip(jobs, expected, strict=True)]
    assert max(errors) < MAX_LOGPROB_ERROR


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_gets_the_tokens_and_logits_of_generate(
    kind: str, checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """Twelve requests of different lengths, chunked, some sharing a prefix's blocks."""
    _, expected = reference(kind)
    worker = load_worker(checkpoint(kind))
    jobs, planner = run_mixed(worker)
    assert planner.num_mixed_steps > 10
    assert sum(job.num_shared_tokens > 30 for job in jobs) == 2
    assert wrong_answers(worker, jobs, expected) == []
    errors = [logprob_error(j.logprobs, e) for j, e in zip(jobs, expected, strict=True)]
    assert max(errors) < MAX_LOGPROB_ERROR


def test_block_sizes_change_nothing(checkpoint: MakeCheckpoint, reference: MakeReference) -> None:
    """One token per block, a prime number, and the default give the same tokens."""
    _, expected = reference("qwen2-windows")
    for block_size in (1, 7, 16):
        worker = load_worker(checkpoint("qwen2-windows"), block_size=block_size)
        jobs = mixed_jobs()
        Planner(NUM_BLOCKS, block_size, step_tokens=24, chunk=15).run(worker, jobs)
        differences = [
            first_difference(job.prompt, job.tokens, answer, lambda prompt, given: [])
            for job, answer in zip(jobs, expected, strict=True)
        ]
        assert differences == [None] * len(jobs)


def test_a_continuation_goes_on_as_if_it_had_never_stopped(
    checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """Given tokens are replayed, and the rest is what would have come."""
    _, expected = reference("llama")
    worker = load_worker(checkpoint("llama"))
    prompt, answer = mixed_prompts()[5], expected[5]
    for cut in (1, 7, NUM_TOKENS - 1):
        worker.allocate_cache(NUM_BLOCKS)
        assert run_alone(worker, prompt, answer.tokens[:cut]).tokens == answer.tokens


# -- planted faults ------------------------------------------------------------------------------


def with_shared_prefix(
    plan: StepPlan, change: Callable[[SlotStart, int], tuple[int, ...]]
) -> StepPlan:
    """Change the block tables of slots that start behind a shared prefix of so many blocks."""
    shared = {row.slot: row.start // BLOCK_SIZE for row in plan.rows if row.start}
    starts = tuple(
        replace(start, block_table=change(start, shared[start.slot]))
        if start.slot in shared
        else start
        for start in plan.starts
    )
    return replace(plan, starts=starts)


def table_off_by_one(plan: StepPlan) -> StepPlan:
    """Read a shared prefix from one entry too early."""
    return with_shared_prefix(
        plan,
        lambda start, num: (
            start.block_table[0],
            *start.block_table[: num - 1],
            *start.block_table[num:],
        ),
    )


def one_stale_block(plan: StepPlan) -> StepPlan:
    """Leave other tokens in the last block of a shared prefix."""
    return with_shared_prefix(
        plan,
        lambda start, num: (
            *start.block_table[: num - 1],
            start.block_table[num - 3],
            *start.block_table[num:],
        ),
    )


def new_blocks_off_by_one(plan: StepPlan) -> StepPlan:
    """Give one slot the blocks behind its own, which are others'."""
    rows = tuple(
        replace(row, new_blocks=tuple(block + 1 for block in row.new_blocks))
        if row.slot == 4
        else row
        for row in plan.rows
    )
    return replace(plan, rows=rows)


class PositionsOffByOne(PassingNetwork):
    """A network that is told wrong positions from the 21st on."""

    def hidden(self, tokens: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        """Shift late positions only: rotary embeddings do not notice if all are shifted."""
        return self.network.hidden(tokens, positions + (positions > 20), step)


@pytest.mark.parametrize("fault", [table_off_by_one, one_stale_block, new_blocks_off_by_one])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_block_is_seen(
    kind: str, fault: Fault, checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """The comparison above turns red for one wrong entry of a block table."""
    _, expected = reference(kind)
    worker = load_worker(checkpoint(kind))
    jobs, _ = run_mixed(worker, fault)
    assert wrong_answers(worker, jobs, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_positions_are_seen(
    kind: str, checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """The comparison above turns red for positions that are off by one."""
    _, expected = reference(kind)
    worker = load_worker(checkpoint(kind))
    tiers = reserve_tiers(worker.layout, NUM_BLOCKS, 0, torch.device("cpu"))
    runner = ModelRunner(
        PositionsOffByOne(worker.network),
        SdpaAttention(tiers.device, torch.float32),
        tiers.device,
        KVTransfer(tiers),
        VOCAB_SIZE,
    )
    jobs, _ = run_mixed(runner)
    assert wrong_answers(worker, jobs, expected)


# -- bf16 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_as_near_to_float32_as_transformers_bf16_is(
    kind: str, checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """Log-probabilities of the first token in bf16: our error is within twice transformers'."""
    _, expected = reference(kind)
    theirs = load_reference(checkpoint(kind), torch.bfloat16)
    worker = load_worker(checkpoint(kind), dtype="bfloat16")
    assert worker.spec.dtype == "bfloat16"
    jobs, _ = run_mixed(worker)
    ours_error, their_error = [], []
    for job, answer in zip(jobs, expected, strict=True):
        first = Reference(answer.tokens[:1], answer.logits[:1])
        ours_error.append(logprob_error(job.logprobs[:1], first))
        bf16 = torch.log_softmax(generate(theirs, job.prompt, 1).logits[0], dim=-1)
        their_error.append(float((bf16 - torch.log_softmax(answer.logits[0], dim=-1)).abs().max()))
        assert len(job.tokens) == NUM_TOKENS
    assert sum(ours_error) < 2 * sum(their_error)
