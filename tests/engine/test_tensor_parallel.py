"""A split model answers as the whole one, with chunks, preemption, prefix hits and both tiers.

The ranks are real processes; rank 0 is this one, under the real scheduler.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rillgate_server.config.groups import SpeculationConfig
from rillgate_server.config.settings import bundled_model_dir
from rillgate_server.core.model_spec import CacheSizes
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.engine.engine import Engine
from rillgate_server.scheduler.scheduler import Scheduler
from rillgate_server.worker.kernels.library import load_kernels
from rillgate_server.worker.network.dense_decoder import DenseDecoder
from rillgate_server.worker.worker import Worker, WorkerOptions
from tests.support.checkpoints import KINDS, VOCAB_SIZE
from tests.support.engine import NO_SPECULATION
from tests.support.engine_run import (
    BATCHER,
    MAX_LOGPROB_ERROR,
    NUM_BLOCKS,
    NUM_HOST_BLOCKS,
    SWAPPING,
    Recorder,
    Run,
    ask_twice,
    differences,
    greedy_request,
    worst_logprob_error,
)
from tests.support.equality import mixed_prompts
from tests.support.planner import Executes, Job, Planner
from tests.support.ranks import RankPool, Split, split_model
from tests.support.reference import Reference
from tests.support.speculation import TableOfAnswers
from tests.support.worker_fixtures import BLOCK_SIZE, MakeCheckpoint, MakeReference
from tests.support.worker_fixtures import NUM_BLOCKS as MANY_BLOCKS


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Where ranks other than 0 come from."""
    pool = RankPool()
    yield pool
    pool.close()


def swapping_run(
    split: Split, num_blocks: int, speculation: SpeculationConfig = NO_SPECULATION
) -> Run:
    """Put the scheduler over a split model with both tiers, audited."""
    executor = split.executor
    sizes = CacheSizes(
        num_blocks, executor.layout.block_bytes, executor.layout.kv_dtype, NUM_HOST_BLOCKS
    )
    return Run(executor, Scheduler(BATCHER, SWAPPING, executor.spec, sizes, speculation))


SIZES = {2: (12, NUM_BLOCKS), 4: (6, 20)}
"""Ranks -> (prompts, blocks of the device tier): four on two cores wait for each other much."""

SPLITS = [(kind, ranks) for ranks in SIZES for kind in KINDS]
"""With four ranks each of the two heads of keys and values is on two of them."""


@pytest.mark.parametrize(("kind", "ranks"), SPLITS)
def test_a_split_model_gets_the_tokens_of_generate(
    kind: str, ranks: int, pool: RankPool, checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """The prompts twice, in chunks, swapped out and in with every block audited."""
    num_prompts, num_blocks = SIZES[ranks]
    _, expected = reference(kind)
    expected = expected[:num_prompts]
    with split_model(pool, checkpoint(kind), ranks, num_blocks, NUM_HOST_BLOCKS) as split:
        run = swapping_run(split, num_blocks)
        ask_twice(run, len(expected))
        load = run.scheduler.load(run.clock.now())
        assert load.decisions.num_swap_preemptions > 0
        assert load.num_cached_tokens > 0
        assert load.copies.num_loaded_blocks > 20
        assert (load.copies.num_refused_blocks, load.copies.num_failed_blocks) == (0, 0)
        assert load.device.num_blocks_used == 0
        assert any(not row.samples for plan in run.recorder.plans for row in plan.rows)
        for first_id in (0, 100):
            got = [run.got[first_id + i, 0] for i in range(len(expected))]
            assert differences(run, got, expected) == []
            pairs = zip(got, expected, strict=True)
            errors = [worst_logprob_error(g, e) for g, e in pairs if g.tokens == e.tokens]
            assert max(errors) < MAX_LOGPROB_ERROR


def test_accepted_drafts_reach_all_ranks(
    pool: RankPool, checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """Rank 0 decides what is right; the others note all of it, and lose no position."""
    _, expected = reference("llama")
    num_prompts, num_blocks = 6, SIZES[2][1]
    texts = [[*p, *it.tokens] for p, it in zip(mixed_prompts(), expected, strict=True)]
    with split_model(pool, checkpoint("llama"), 2, num_blocks, NUM_HOST_BLOCKS) as split:
        run = swapping_run(split, num_blocks, SpeculationConfig("draft-model", 4, "a table"))
        run.recorder = Recorder(TableOfAnswers(split.executor, texts, lies=0.3))
        run.engine = Engine(run.scheduler, run.recorder, run.clock)
        for i in range(num_prompts):
            run.add(greedy_request(i, mixed_prompts()[i]))
        run.finish()
        load = run.scheduler.load(run.clock.now())
        assert load.num_drafted_tokens > load.num_accepted_tokens > 20
        got = [run.got[i, 0] for i in range(num_prompts)]
        assert differences(run, got, expected[:num_prompts]) == []


def whole_worker(
    path: Path, dtype: str, quantization: str, include: tuple[str, ...] = ()
) -> Worker:
    """Load a checkpoint, not split."""
    options = WorkerOptions(
        dtype,
        block_size_tokens=BLOCK_SIZE,
        quantization=quantization,
        quantization_include=include,
    )
    worker = Worker.load(path, options)
    worker.allocate_cache(MANY_BLOCKS)
    return worker


def error_of(executor: Executes, expected: list[Reference]) -> float:
    """Return how far the mixed batch's first log-probabilities are off."""
    sampling = SamplingParams(seed=0, temperature=0.0, num_logprobs=VOCAB_SIZE)
    jobs = [Job(prompt, 1, sampling) for prompt in mixed_prompts()]
    Planner(MANY_BLOCKS, BLOCK_SIZE, step_tokens=1024, chunk=1024).run(executor, jobs)
    errors = []
    for job, answer in zip(jobs, expected, strict=True):
        got = dict(job.logprobs[0].top)
        exact = answer.logits[0].log_softmax(dim=-1)
        errors.append(torch.tensor([got[i] for i in range(VOCAB_SIZE)]) - exact)
    return float(torch.cat(errors).std())


@pytest.mark.parametrize(
    ("kind", "method", "include"),
    [
        ("qwen2", "int8", ()),
        ("deepseek_v3", "int8", ()),
        ("qwen3", "int8", ("embeddings", "head")),
        ("llama-tied", "int8", ("head",)),
        ("qwen2", "bnb-int8", ()),
        ("deepseek_v3", "bnb-nf4", ()),
    ],
)
def test_a_split_of_quantised_weights_is_as_near_the_exact_model_as_the_whole(
    kind: str,
    method: str,
    include: tuple[str, ...],
    pool: RankPool,
    checkpoint: MakeCheckpoint,
    reference: MakeReference,
) -> None:
    """A rank scales its own part of a row-wise layer's input: not equal, but no further off.
    A mixture's experts, and what is quantised on request, are split, too."""
    path, (_, expected) = checkpoint(kind), reference(kind)
    whole = whole_worker(path, "float32", method, include)
    order: dict[str, Any] = {"quantization": method, "include": include}
    with split_model(pool, path, num_blocks=MANY_BLOCKS, **order) as split:
        assert 0.0 < error_of(split.executor, expected) < 1.2 * error_of(whole, expected)


@pytest.mark.skipif(load_kernels() is None, reason="no C++ kernels here")
@pytest.mark.parametrize(
    ("kind", "ranks", "quantization"),
    [("llama-tied", 2, "none"), ("qwen2", 4, "int8"), ("qwen3", 2, "int8"), ("mistral", 4, "none")],
)
def test_a_split_of_the_c_layers_in_bf16_is_as_near_as_the_whole(
    kind: str,
    ranks: int,
    quantization: str,
    pool: RankPool,
    checkpoint: MakeCheckpoint,
    reference: MakeReference,
) -> None:
    """Each rank has its heads and its part of the MLP; what it adds is summed in float32."""
    path, (_, expected) = checkpoint(kind), reference(kind)
    whole = whole_worker(path, "bfloat16", quantization)
    order: dict[str, Any] = {"dtype": "bfloat16", "quantization": quantization}
    with split_model(pool, path, ranks, MANY_BLOCKS, **order) as split:
        assert isinstance(split.worker.network, DenseDecoder)
        assert 0.0 < error_of(split.executor, expected) < 1.2 * error_of(whole, expected)


@pytest.mark.parametrize("method", ["int8", "bnb-int8"])
def test_a_split_of_int8_weights_is_within_two_percent_of_the_whole(
    method: str, pool: RankPool
) -> None:
    """The bundled model's logits: weights are the whole model's, bit by bit; activations between
    ranks' parts are rounded apart."""
    path = bundled_model_dir()
    whole = whole_worker(path, "float32", method)
    with split_model(pool, path, num_blocks=MANY_BLOCKS, quantization=method) as split:
        halves = all_logprobs(split.executor, whole.spec.vocab_size)
    expected = all_logprobs(whole, whole.spec.vocab_size)
    assert 0.0 < float((halves - expected).norm() / expected.norm()) < 0.02


def all_logprobs(executor: Executes, vocab_size: int) -> torch.Tensor:
    """Return those behind some prompts, less their mean as logits are. [prompts, vocab_size]."""
    sampling = SamplingParams(seed=0, temperature=0.0, num_logprobs=vocab_size)
    jobs = [Job(list(range(5 + i, 60 + 3 * i)), 1, sampling) for i in range(8)]
    Planner(MANY_BLOCKS, BLOCK_SIZE, step_tokens=1024, chunk=1024).run(executor, jobs)
    found = [dict(job.logprobs[0].top) for job in jobs]
    rows = torch.tensor([[one[i] for i in range(vocab_size)] for one in found])
    return rows - rows.mean(dim=-1, keepdim=True)
