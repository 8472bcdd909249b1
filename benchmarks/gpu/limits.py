"""What the device can do at most, measured: read bandwidth, and the rate of matrix products.

Best of several tries: a limit is what can be reached at all. On a CPU it measures the CPU, so that
tests run the same code.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.gpu.rows import Row
from benchmarks.gpu.scale import Scale
from rillgate_server.worker.compute_device import describe, find_device

_NUM_TRIES = 15
_INT8_ROWS = 32
"""Fewer rows are refused on GPUs; a multiple of it is fine."""


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """All tries, seconds each, and what each of them did."""

    read_bytes: int
    read_s: tuple[float, ...]
    copy_s: tuple[float, ...]
    """Of the same bytes, each read and written."""
    operations: float
    bf16_s: tuple[float, ...]
    int8_s: tuple[float, ...]

    def row(self, device: str) -> Row:
        """Return it as a row."""
        return {
            "what": "limits",
            "device": device,
            "read_bytes_per_s": self.read_bytes / min(self.read_s),
            "copy_bytes_per_s": 2 * self.read_bytes / min(self.copy_s),
            "bf16_ops_per_s": self.operations / min(self.bf16_s),
            "bf16_ops_per_s_median": self.operations / statistics.median(self.bf16_s),
            "int8_ops_per_s": self.operations / min(self.int8_s),
            "samples": [self.read_s, self.copy_s, self.bf16_s, self.int8_s],
        }


def measure(subject: object, scale: Scale) -> Iterator[Row]:
    """Measure the device that a replica would compute on."""
    device = find_device()
    yield measure_limits(device, scale.read_bytes, scale.matrix).row(describe(device))


@torch.inference_mode()
def measure_limits(device: torch.device, read_bytes: int, matrix: int) -> DeviceLimits:
    """Sum and copy an array of `read_bytes`, and multiply square matrices."""
    data = torch.ones(read_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(data)
    read_s = times_of(device, lambda: data.sum())
    copy_s = times_of(device, lambda: target.copy_(data))
    size = -(-matrix // _INT8_ROWS) * _INT8_ROWS
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    bf16_s = times_of(device, lambda: a @ b)
    whole = torch.randint(-127, 127, (size, size), dtype=torch.int8, device=device)
    int8_s = times_of(device, lambda: torch._int_mm(whole, whole.T))
    return DeviceLimits(read_bytes, read_s, copy_s, 2.0 * size**3, bf16_s, int8_s)


def times_of(device: torch.device, run: Callable[[], object]) -> tuple[float, ...]:
    """Return the seconds of several calls behind one that warms up, on the device's own clock."""
    run()
    return tuple(_seconds(device, run) for _ in range(_NUM_TRIES))


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    if device.type != "cuda":
        begin_s = time.perf_counter()
        run()
        return time.perf_counter() - begin_s
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
