"""A model on a GPU, whole and split: the tokens that transformers' `generate` gives on a CPU.

In float32, under the real scheduler: with chunks, preemption, prefix hits, and both tiers over the
real bus with every block audited.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rillgate_server.core.model_spec import CacheSizes, KVLayout, ModelSpec
from rillgate_server.core.step import StepLimits
from rillgate_server.engine.executor import Executor
from rillgate_server.errors import ConfigError
from rillgate_server.scheduler.scheduler import Scheduler
from rillgate_server.worker.compute_device import free_memory
from rillgate_server.worker.rank_group import RankGroup
from rillgate_server.worker.rendezvous import RankPlace
from rillgate_server.worker.worker import Worker, WorkerOptions
from tests.gpu.conftest import Note
from tests.support.checkpoints import KINDS
from tests.support.engine_run import (
    BATCHER,
    MAX_LOGPROB_ERROR,
    NUM_BLOCKS,
    NUM_HOST_BLOCKS,
    SWAPPING,
    Run,
    ask_twice,
    differences,
    worst_logprob_error,
)
from tests.support.ranks import WAIT_S, RankPool, free_port, let_ranks_share_a_gpu, split_model
from tests.support.reference import Reference
from tests.support.worker_fixtures import BLOCK_SIZE, MakeCheckpoint, MakeReference

SPLIT_KINDS = ("llama", "qwen2", "deepseek_v3")
NUM_PROMPTS = 12
LIMITS = StepLimits(BATCHER.max_running, BATCHER.max_step_tokens, 512)
"""So that decode steps are captured."""


CUDA = torch.device("cuda", 0)

Asked = Callable[[str], tuple[Path, list[Reference]]]


@pytest.fixture(scope="module")
def pool(cuda: torch.device) -> Iterator[RankPool]:
    """Where ranks other than 0 come from."""
    assert cuda == CUDA
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def asked(checkpoint: MakeCheckpoint, reference: MakeReference) -> Asked:
    """Return a function that gives a kind's checkpoint and what `generate` answers to prompts."""
    return lambda kind: (checkpoint(kind), reference(kind)[1])


def check(executor: Executor, spec: ModelSpec, layout: KVLayout, expected: list[Reference]) -> str:
    """Compare what the engine gets of it with the reference; return the worst logprob error."""
    sizes = CacheSizes(NUM_BLOCKS, layout.block_bytes, layout.kv_dtype, NUM_HOST_BLOCKS)
    run = Run(executor, Scheduler(BATCHER, SWAPPING, spec, sizes))
    ask_twice(run, len(expected))
    load = run.scheduler.load(run.clock.now())
    assert load.decisions.num_swap_preemptions > 0
    assert load.copies.num_loaded_blocks > 20
    assert (load.copies.num_refused_blocks, load.copies.num_failed_blocks) == (0, 0)
    assert load.device.num_blocks_used == 0
    worst = 0.0
    for first_id in (0, 100):
        got = [run.got[first_id + i, 0] for i in range(len(expected))]
        assert differences(run, got, expected) == []
        same = [(g, e) for g, e in zip(got, expected, strict=True) if g.tokens == e.tokens]
        worst = max(worst, *(worst_logprob_error(g, e) for g, e in same))
    assert worst < MAX_LOGPROB_ERROR
    return f"largest error of a logprob {worst:.1e}"


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_model_on_the_gpu_gets_the_tokens_of_generate(
    kind: str, cuda: torch.device, asked: Asked, note: Note
) -> None:
    """One device, one process."""
    path, expected = asked(kind)
    options = WorkerOptions("float32", block_size_tokens=BLOCK_SIZE, device=cuda)
    worker = Worker.load(path, options)
    spare = worker.spare_memory(partial(free_memory, cuda, 0, 1), LIMITS)
    assert spare.is_measured
    assert 0 < spare.device_bytes < free_memory(cuda, 0, 1).device_bytes
    worker.allocate_cache(NUM_BLOCKS, NUM_HOST_BLOCKS, audit=True, limits=LIMITS)
    assert worker.num_pageable_host_blocks == 0
    note(check(worker, worker.spec, worker.layout, expected))
    worker.close()


@pytest.mark.parametrize("kind", SPLIT_KINDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_split_over_nccl_gets_the_tokens_of_generate(
    kind: str, ranks: int, pool: RankPool, asked: Asked, note: Note
) -> None:
    """One rank goes through every collective, too, and needs one device alone."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks need {ranks} CUDA devices")
    path, expected = asked(kind)
    with split_model(pool, path, ranks, NUM_BLOCKS, NUM_HOST_BLOCKS, device=CUDA) as split:
        assert torch.distributed.get_backend() == "nccl"
        found = check(split.executor, split.worker.spec, split.worker.layout, expected)
        note(f"{found}, {split.group.collectives.num_entered} collectives")


@pytest.mark.parametrize("kind", SPLIT_KINDS)
def test_two_ranks_on_one_gpu_get_the_tokens_of_generate(
    kind: str, pool: RankPool, asked: Asked, note: Note, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over Gloo, which nobody would do but to test the split without a second device."""
    let_ranks_share_a_gpu(monkeypatch)
    path, expected = asked(kind)
    order: dict[str, Any] = {"device": CUDA, "shares_gpu": True, "local_rank": 0}
    with split_model(pool, path, 2, NUM_BLOCKS, NUM_HOST_BLOCKS, **order) as split:
        expected = expected[:NUM_PROMPTS]
        note(check(split.executor, split.worker.spec, split.worker.layout, expected))


def test_two_ranks_cannot_have_one_gpu(pool: RankPool, checkpoint: MakeCheckpoint) -> None:
    """Unless they share it on purpose, as above; both end, and say which device."""
    port = free_port()
    order = {"path": str(checkpoint("llama")), "port": port, "ranks": 2, "device": "cuda"}
    other = pool.start(rank=1, local_rank=0, **order)
    with pytest.raises(ConfigError, match=r"rank 1 and rank 0 .* have the same CUDA device, GPU-"):
        RankGroup.join(RankPlace(0, 2, "127.0.0.1", port), {}, CUDA, WAIT_S)
    assert other.wait() == 1
