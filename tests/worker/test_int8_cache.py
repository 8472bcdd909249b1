"""A worker with the INT8 cache: every architecture, and no token hangs on chunks or neighbours.

Its answers are not quite `generate`'s, so they are compared with one another. Sums in another
order may move an element over the border between two integers: a flip, which then moves
log-probabilities by a hundredth, where reading unrounded keys moves those of every request.
"""

import statistics
from collections.abc import Sequence

import pytest
import torch

from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.worker.worker import Worker
from tests.support.checkpoints import KINDS, VOCAB_SIZE
from tests.support.equality import NUM_TOKENS, PARENT, full_row, logprob_error, mixed_prompts
from tests.support.planner import Job, Planner
from tests.support.reference import Reference, generate, load_reference
from tests.support.worker_fixtures import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    MakeCheckpoint,
    MakeReference,
    load_worker,
)

SAMPLING = SamplingParams(seed=0, temperature=0.0, num_logprobs=VOCAB_SIZE)
MAX_MEDIAN_ERROR = 5e-3
"""Of a kind's requests: most see no flip. With a first chunk that reads the step's own keys instead
of the cache the kinds' medians are 0.05 to 0.11; as it is, 1e-6 to 3e-4."""
MAX_FLIP = 0.1
"""What a flip may do to a log-probability; the kinds show 0.02."""


def run_alone(worker: Worker, prompt: Sequence[int], chunk: int) -> Job:
    """Run one request on a fresh cache, its prefill in chunks."""
    worker.allocate_cache(NUM_BLOCKS)
    job = Job(prompt, NUM_TOKENS, SAMPLING)
    Planner(NUM_BLOCKS, BLOCK_SIZE, step_tokens=1024, chunk=chunk).run(worker, [job])
    return job


def run_together(worker: Worker) -> list[Job]:
    """Run all requests, one entering per step, some on the prefix of another."""
    worker.allocate_cache(NUM_BLOCKS)
    jobs = [
        Job(
            prompt,
            NUM_TOKENS,
            SAMPLING,
            starts_at_step=i,
            shares_with=PARENT if i % 2 and i > PARENT else None,
        )
        for i, prompt in enumerate(mixed_prompts())
    ]
    Planner(NUM_BLOCKS, BLOCK_SIZE, step_tokens=24, chunk=15).run(worker, jobs)
    assert sum(job.num_shared_tokens > 30 for job in jobs) == 2
    return jobs


def errors(jobs: Sequence[Job], expected: Sequence[Job]) -> list[float]:
    """Compare log-probabilities up to a first other token, which must be as good."""
    found = []
    for job, other in zip(jobs, expected, strict=True):
        logits = torch.stack([full_row(entry) for entry in other.logprobs])
        found.append(logprob_error(job.logprobs, Reference(other.tokens, logits)))
        pairs = enumerate(zip(job.tokens, other.tokens, strict=True))
        first = next((i for i, (ours, theirs) in pairs if ours != theirs), None)
        if first is not None:
            assert logits[first].max() - logits[first, job.tokens[first]] < 2 * MAX_FLIP
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_neighbours_change_no_token(kind: str, checkpoint: MakeCheckpoint) -> None:
    """Twelve requests alone at once, alone in chunks, and together get the same answers."""
    worker = load_worker(checkpoint(kind), kv_dtype="int8")
    at_once = [run_alone(worker, prompt, chunk=1024) for prompt in mixed_prompts()]
    in_chunks = [run_alone(worker, prompt, chunk=7) for prompt in mixed_prompts()]
    for jobs in (in_chunks, run_together(worker)):
        found = errors(jobs, at_once)
        assert statistics.median(found) < MAX_MEDIAN_ERROR
        assert max(found) < MAX_FLIP
        same = sum(job.tokens == other.tokens for job, other in zip(jobs, at_once, strict=True))
        assert same >= len(jobs) - 2


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_nearer_to_float32_than_bf16_is(
    kind: str, checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """The first token's log-probabilities, against transformers in float32 and in bf16."""
    _, expected = reference(kind)
    theirs = load_reference(checkpoint(kind), torch.bfloat16)
    jobs = run_together(load_worker(checkpoint(kind), kv_dtype="int8"))
    int8_error = bf16_error = 0.0
    for job, answer in zip(jobs, expected, strict=True):
        first = Reference(answer.tokens[:1], answer.logits[:1])
        int8_error += logprob_error(job.logprobs[:1], first)
        bf16 = torch.log_softmax(generate(theirs, job.prompt, 1).logits[0], dim=-1)
        bf16_error += float((bf16 - torch.log_softmax(answer.logits[0], dim=-1)).abs().max())
    assert 0.01 < int8_error < bf16_error


def test_the_worker_says_what_its_cache_keeps(checkpoint: MakeCheckpoint) -> None:
    """The layout names the type, and a block is smaller than one of the computation's type."""
    exact = load_worker(checkpoint("qwen3"), dtype="bfloat16")
    small = load_worker(checkpoint("qwen3"), dtype="bfloat16", kv_dtype="int8")
    assert (exact.layout.kv_dtype, small.layout.kv_dtype) == ("bfloat16", "int8")
    assert small.spec.dtype == "bfloat16"
    assert small.layout.block_bytes < exact.layout.block_bytes
