"""Memory for weights in pages of 2 MiB, where the kernel gives them to those who ask.

A product at one row reads each weight once: with pages of 4 KiB every page costs a walk through the
page tables, and the processor's prefetch ends at its border. Owns the runs of memory that tensors
lie in, one behind another, so that they share pages: a page that nothing was written to takes no
memory. Does not know weights.
"""

import contextlib
import mmap

import torch
from torch import Tensor

_PAGE_BYTES = 2 << 20
_RUN_BYTES = 64 << 20
"""Of memory that is asked for at a time; larger tensors get a run of their own."""
_ALIGNMENT = 64
"""Bytes of a line of the cache, and of a vector."""


class HugePages:
    """Gives memory out, and none back: a run is freed with the last tensor in it.

    State: what is left of the last run.
    """

    def __init__(self) -> None:
        """Begin without any."""
        self._left = torch.empty(0, dtype=torch.uint8)

    def __repr__(self) -> str:
        """Show what is left."""
        return f"HugePages({len(self._left)} bytes left)"

    def take(self, num_bytes: int) -> Tensor:
        """Return [num_bytes], uint8, aligned for vectors; what is in it is not said."""
        needed = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        if needed > len(self._left):
            self._left = _reserve(max(needed, _RUN_BYTES))
        taken, self._left = self._left[:num_bytes], self._left[needed:]
        return taken


def _reserve(num_bytes: int) -> Tensor:
    """Map memory that begins with a page; nothing of it is there before it is written to."""
    memory = mmap.mmap(-1, num_bytes + 2 * _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without such pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    first = -everything.data_ptr() % _PAGE_BYTES
    # To the end of its last page: the next run may not share it, and it would be of small ones.
    return everything[first : first + -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES]
