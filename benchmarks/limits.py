"""What the machine can do at most: read bandwidth, and operations of matrix products.

Measured in the same run as what is compared with it, because a shared machine's speed drifts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_READ_BYTES = 800 << 20
"""Far larger than any cache."""
_MATRIX = 2048
"""Rows and columns: large enough for the full rate, small enough for a tenth of a second."""


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """Best of a few tries: a limit is what can be reached at all."""

    read_bytes_per_s: float
    bf16_ops_per_s: float
    """Multiplications and additions, counted apart."""
    int8_ops_per_s: float
    """The same, of INT8 products summed in 32 bits."""


def measure_limits(num_tries: int = 7) -> MachineLimits:
    """Measure both with torch's current number of threads."""
    data = torch.ones(_READ_BYTES // 8, dtype=torch.int64)
    read_s = _best(lambda: data.sum(), num_tries)
    a = torch.randn(_MATRIX, _MATRIX).bfloat16()
    b = torch.randn(_MATRIX, _MATRIX).bfloat16()
    product_s = _best(lambda: a @ b, num_tries * 4)
    whole = torch.randint(-127, 127, (_MATRIX, _MATRIX), dtype=torch.int8)
    whole_s = _best(lambda: torch._int_mm(whole, whole.T), num_tries * 4)
    operations = 2 * _MATRIX**3
    return MachineLimits(_READ_BYTES / read_s, operations / product_s, operations / whole_s)


def _best(run: Callable[[], object], num_tries: int) -> float:
    """Return the shortest of `num_tries` runs, in seconds."""
    run()
    times = []
    for _ in range(num_tries):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)
