"""Memory for weights: aligned, apart, and in large pages where the kernel has them."""

from pathlib import Path

import pytest
import torch

from rillgate_server.worker.huge_pages import HugePages


def test_tensors_lie_apart_on_whole_vectors() -> None:
    """Small ones share a run; one that does not fit into the rest, or into a run, gets another."""
    memory = HugePages()
    sizes = [1, 64, 100, 40 << 20, 30 << 20, 100 << 20, 5]
    taken = [memory.take(size) for size in sizes]
    for number, (tensor, size) in enumerate(zip(taken, sizes, strict=True)):
        assert (tensor.shape, tensor.dtype) == ((size,), torch.uint8)
        assert tensor.data_ptr() % 64 == 0
        tensor[0] = tensor[-1] = number
    assert [int(tensor[0]) for tensor in taken] == [int(tensor[-1]) for tensor in taken]
    assert [int(tensor[0]) for tensor in taken] == list(range(len(sizes)))


def test_pages_are_large_where_the_kernel_has_them() -> None:
    """Eight MiB that were written to lie in four pages."""
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text():
        pytest.skip("this kernel gives no such pages")
    before = _huge_bytes()
    taken = HugePages().take(8 << 20)
    taken.zero_()
    if _huge_bytes() == before:
        pytest.skip("this kernel has none left")
    assert _huge_bytes() - before >= len(taken)


def _huge_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("AnonHugePages")).split()[1]) * 1024
