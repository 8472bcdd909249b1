"""The real scheduler over the worker as it is on a GPU: the tokens of transformers' `generate`.

Two plans in flight, tokens handed on by the device, decode steps of captured sizes, chunks,
preemption, both tiers. Without a GPU Triton's kernels run in its interpreter, so it is few prompts;
`make gpu-check` asks all of every kind.
"""

from pathlib import Path

import torch

from rillgate_server.core.model_spec import CacheSizes
from rillgate_server.core.step import StepLimits
from rillgate_server.scheduler.scheduler import Scheduler
from rillgate_server.worker.compute_device import CPU, find_device
from rillgate_server.worker.model_loader import WeightStore, load_network
from rillgate_server.worker.network.gpu_decoder import GpuDecoder
from rillgate_server.worker.worker import Worker, WorkerOptions
from tests.support.engine_run import (
    BATCHER,
    NUM_HOST_BLOCKS,
    SWAPPING,
    PipelinedRecorder,
    Run,
    ask_twice,
    differences,
)
from tests.support.worker_fixtures import BLOCK_SIZE, MakeCheckpoint, MakeReference

KIND = "qwen2-windows"
NUM_PROMPTS = 6
NUM_BLOCKS = 24


def load_gpu_worker(path: Path) -> Worker:
    """Load what a GPU would compute with."""
    device = find_device()
    worker = Worker.load(
        path, WorkerOptions("float32", block_size_tokens=BLOCK_SIZE, device=device)
    )
    if device == CPU:
        store = WeightStore(CPU, 1 << 30)
        worker.network = GpuDecoder(load_network(path, torch.float32, store=store))
        worker.uses_triton = True
    assert isinstance(worker.network, GpuDecoder)
    return worker


def test_requests_get_the_tokens_of_generate(
    checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """Though each plan is made before the last one's tokens are known."""
    path, expected = checkpoint(KIND), reference(KIND)[1][:NUM_PROMPTS]
    worker = load_gpu_worker(path)
    limits = StepLimits(BATCHER.max_running, BATCHER.max_step_tokens, 512)
    worker.allocate_cache(NUM_BLOCKS, NUM_HOST_BLOCKS, audit=True, limits=limits)
    layout = worker.layout
    sizes = CacheSizes(NUM_BLOCKS, layout.block_bytes, layout.kv_dtype, NUM_HOST_BLOCKS)
    run = Run(worker, Scheduler(BATCHER, SWAPPING, worker.spec, sizes))
    ask_twice(run, NUM_PROMPTS)
    assert isinstance(run.recorder, PipelinedRecorder)
    assert run.recorder.most_begun == 2
    load = run.scheduler.load(run.clock.now())
    assert load.num_preemptions > 0
    assert load.copies.num_refused_blocks == load.copies.num_failed_blocks == 0
    assert load.device.num_blocks_used == 0
    for first_id in (0, 100):
        got = [run.got[first_id + i, 0] for i in range(NUM_PROMPTS)]
        assert differences(run, got, expected) == []
    worker.close()
