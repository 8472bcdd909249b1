"""Pages that stay where they are, so that a GPU can copy from and to them on its own.

Owns the locking and what is said when it fails. Does not know blocks.
"""

import contextlib
import logging
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

Pin = Callable[[Tensor], None]
"""Locks a tensor's pages for as long as it lives; raises OSError where it cannot."""


def pin_for_cuda(memory: Tensor) -> None:
    """Lock host memory for the GPU's copies. Touches all pages: seconds for a large tier.

    Not torch's `pin_memory`, whose allocator rounds up to a power of two and copies.
    """
    runtime = torch.cuda.cudart()
    address = memory.data_ptr()
    code = int(runtime.cudaHostRegister(address, memory.numel(), 0))
    if code:
        # CUDA keeps the error for whoever launches the next kernel.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda").add_(1)
        raise OSError(f"cudaHostRegister gave error {code}")
    weakref.finalize(memory, runtime.cudaHostUnregister, address)


def try_to_pin(memory: Tensor, pin: Pin) -> bool:
    """Pin what can be pinned, or say that it is not; return whether it is."""
    try:
        pin(memory)
    except OSError as error:
        _log.warning(
            "%d bytes of pinned memory for the cache's host tier cannot be had (%s): the tier is "
            "in pageable memory, copies from and to it are slower; ask for less with "
            "cache.host_memory, or raise the limit on locked memory",
            memory.numel(),
            error,
        )
        return False
    return True
