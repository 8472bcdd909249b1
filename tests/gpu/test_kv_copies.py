"""Copies between a GPU's memory and pinned host memory: the same bytes, how fast, and beside work.

The figures are in the table at the end, not asserted: how fast the bus is, is the machine's.
"""

import random
import time

import pytest
import torch
from torch import Tensor

from rillgate_server.core.model_spec import KVLayout
from rillgate_server.core.step import CopyDirection, CopyJob
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.kv_tiers import reserve_tiers
from rillgate_server.worker.kv_transfer import BlockCopier, KVTransfer
from rillgate_server.worker.pinned_memory import pin_for_cuda
from rillgate_server.worker.stream_copier import StreamCopier
from tests.gpu.conftest import Note
from tests.support.kv_copies import LOAD, STORE, check_audit, check_random_copies, wait_all

SMALL = KVLayout.build(4, "bfloat16", (((2, 24), (2, 16), None), ((1, 5), (1, 3), 8)))
OF_7B = KVLayout.build(16, "bfloat16", (((8, 128), (8, 128), None),) * 32)
"""2 MiB per block: a model of 7 billion parameters with grouped queries."""
NUM_BLOCKS = 512
NUM_MATMULS = 300
"""Of 8192 x 8192 in bfloat16: half a second and more, where a copy takes 20 to 50 ms."""


@pytest.fixture
def large(cuda: torch.device) -> BlockCopier:
    """Two tiers of 1 GiB each."""
    return reserve_tiers(OF_7B, NUM_BLOCKS, NUM_BLOCKS, cuda)


@pytest.mark.parametrize("seed", range(5))
def test_random_jobs_leave_every_block_as_indexing_would(seed: int, cuda: torch.device) -> None:
    """The same check as in memory, in both directions."""
    check_random_copies(reserve_tiers(SMALL, 33, 50, cuda), seed)


def test_audit_finds_a_bit_that_changed_in_the_host_tier(cuda: torch.device) -> None:
    """The same check as in memory."""
    check_audit(reserve_tiers(SMALL, 33, 50, cuda))


def test_random_jobs_work_with_pageable_memory_too(cuda: torch.device) -> None:
    """What is left where no memory can be pinned."""
    device = KVStorage(SMALL, 33, device=cuda)
    check_random_copies(StreamCopier(device, KVStorage(SMALL, 50)), 0)


def test_memory_that_cannot_be_pinned_costs_no_later_step(cuda: torch.device) -> None:
    """CUDA keeps an error for the next kernel: whoever computes next must not get it."""
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    pin_for_cuda(memory)
    with pytest.raises(OSError, match="cudaHostRegister gave error"):
        pin_for_cuda(memory)
    assert float(torch.ones(3, device=cuda).add_(1).sum()) == 6


def test_a_copy_takes_what_the_step_before_it_has_computed(large: BlockCopier) -> None:
    """It begins while the GPU is still busy with the blocks' values, and waits for them."""
    busy = torch.ones(4096, 4096, device=large.device.bytes.device)
    for _ in range(50):
        busy = busy @ busy / 4096
    large.device.bytes[:8] = busy[:8, :1].to(torch.uint8)
    transfer = KVTransfer(large)
    transfer.begin(CopyJob(0, STORE, tuple((block, block) for block in range(8))))
    assert wait_all(transfer, 1)[0].failed_pairs == ()
    assert (large.host.bytes[:8] == 1).all()
    transfer.close()


@pytest.mark.parametrize("direction", [STORE, LOAD], ids=lambda direction: direction.value)
def test_copy_bandwidth(direction: CopyDirection, large: BlockCopier, note: Note) -> None:
    """Scattered blocks, against one plain copy of the same pinned bytes."""
    assert large.host.is_pinned
    transfer = KVTransfer(large)
    job = scattered_job(0, direction)
    transfer.begin(job)  # warm
    wait_all(transfer, 1)
    transfer.begin(job)
    done = wait_all(transfer, 1)[0]
    assert done.failed_pairs == ()
    plain_s = plain_copy_s(large, direction)
    rate, plain_rate = done.num_bytes / done.seconds / 1e9, large.host.num_bytes / plain_s / 1e9
    note(f"{rate:.1f} GB/s, {100 * rate / plain_rate:.0f} % of a plain copy's {plain_rate:.1f}")
    transfer.close()


@pytest.mark.parametrize("direction", [STORE, LOAD], ids=lambda direction: direction.value)
def test_copies_run_beside_the_computation(
    direction: CopyDirection, large: BlockCopier, note: Note
) -> None:
    """A copy ends while matrix products that were asked for after it are still computed."""
    transfer = KVTransfer(large)
    matrix = torch.randn(8192, 8192, device=large.device.bytes.device, dtype=torch.bfloat16)
    alone_s = elapsed_s(*multiply(matrix))
    transfer.begin(scattered_job(0, direction))
    begin, end = multiply(matrix)
    done = wait_all(transfer, 1)[0]
    assert not end.query()
    note(
        f"products {elapsed_s(begin, end) * 1e3:.0f} ms beside a copy of {done.seconds * 1e3:.0f} "
        f"ms, {alone_s * 1e3:.0f} ms alone"
    )
    transfer.close()


def scattered_job(copy_id: int, direction: CopyDirection) -> CopyJob:
    """Copy all blocks, none beside its neighbour."""
    rng = random.Random(copy_id)
    blocks = range(NUM_BLOCKS)
    pairs = zip(rng.sample(blocks, NUM_BLOCKS), rng.sample(blocks, NUM_BLOCKS), strict=True)
    return CopyJob(copy_id, direction, tuple(pairs))


def plain_copy_s(tiers: BlockCopier, direction: CopyDirection) -> float:
    """Copy a whole tier at once; return the second run's seconds."""
    source, target = tiers.device.bytes, tiers.host.bytes
    if direction is LOAD:
        source, target = target, source
    seconds = 0.0
    for _ in range(2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return seconds


def multiply(matrix: Tensor) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Ask for NUM_MATMULS products; return the events before and after them."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(NUM_MATMULS):
        torch.mm(matrix, matrix)
    end.record()
    return begin, end


def elapsed_s(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    """Wait for the second event; return the time between both."""
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
