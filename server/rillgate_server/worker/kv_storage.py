"""A tier's bytes: one tensor `[num_blocks, block_bytes]`, whose layers worker.layer_cache views.

Owns the storage of either tier. Does not know which block belongs to whom: block numbers come with
each plan, and what is free or shared is decided elsewhere; nor what lies where in a block (KVLayout
does), nor how blocks come from one tier to the other (worker.kv_transfer).
"""

from contextlib import suppress
from mmap import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap

import torch
from torch import Tensor

from rillgate_server.core.model_spec import KVLayout
from rillgate_server.errors import OutOfMemory
from rillgate_server.worker.compute_device import CPU, free_bytes
from rillgate_server.worker.layer_cache import SlotMapping, view_layer
from rillgate_server.worker.pinned_memory import Pin, try_to_pin

_PAGE_BYTES = 4096


class KVStorage:
    """One tier's memory, reserved whole: nothing is allocated per block afterwards.

    State: the bytes alone. Starts as zeros, and `clear` zeroes blocks before they are filled
    anew: what lies past a row's end is masked, but a NaN of a failed request would come through
    the mask as 0 * NaN and end its neighbours.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        *,
        device: torch.device = CPU,
        taken_bytes: int = 0,
        pin: Pin | None = None,
    ) -> None:
        """Reserve the memory of `num_blocks`, which may be none; raises OutOfMemory.

        `taken_bytes` are promised to another tier in the same memory, whose pages the system may
        not have handed out yet. `pin` locks the host tier's pages where a GPU copies from them;
        where it cannot, that is logged and the memory stays pageable.
        """
        num_bytes = num_blocks * layout.block_bytes
        left_bytes = max(0, free_bytes(device) - taken_bytes)
        if num_bytes > left_bytes:
            raise OutOfMemory(f"a cache tier of {num_blocks} blocks", num_bytes, left_bytes)
        self.layout = layout
        self.num_blocks = num_blocks
        memory = _reserve(num_bytes, device) if pin is None else _reserve_whole(num_bytes)
        self.bytes = memory.view(num_blocks, layout.block_bytes)
        """[num_blocks, block_bytes], uint8, on the tier's device."""
        self.is_pinned = pin is not None and num_bytes > 0 and try_to_pin(self.bytes, pin)
        self.num_pageable_blocks = 0 if pin is None or self.is_pinned else num_blocks
        """Blocks that were to be pinned and are not."""
        self.layers = tuple(view_layer(self.bytes, layout, layer) for layer in layout.layers)

    def __repr__(self) -> str:
        """Show the size."""
        return f"KVStorage(num_blocks={self.num_blocks}, block_bytes={self.layout.block_bytes})"

    @property
    def num_bytes(self) -> int:
        """Of all blocks."""
        return self.num_blocks * self.layout.block_bytes

    def clear(self, blocks: list[int]) -> None:
        """Zero whole blocks."""
        for block in blocks:
            self.bytes[block].zero_()

    def clear_tokens(self, slot_mapping: SlotMapping) -> None:
        """Zero what single tokens have left."""
        for layer in self.layers:
            layer.clear(slot_mapping)


def _reserve(num_bytes: int, device: torch.device) -> Tensor:
    """Return zeros. [num_bytes], uint8."""
    if device.type == "cuda":
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    # torch.zeros would write every page at once: seconds, and memory that nobody may ever use. The
    # system hands pages out as they are touched.
    pages = mmap(-1, max(1, num_bytes), flags=MAP_PRIVATE | MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)[:num_bytes]


def _reserve_whole(num_bytes: int) -> Tensor:
    """Return zeros whose pages are all there, for pinning. [num_bytes], uint8, on the CPU.

    By all threads, in pages of 2 MiB where the system has them: the driver alone would take the
    pages one by one (8 GiB, 16 cores, an H200's host: 2.8 s, and 0.4 s like this).
    """
    pages = mmap(-1, max(1, num_bytes), flags=MAP_PRIVATE | MAP_ANONYMOUS)
    with suppress(OSError):
        pages.madvise(MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)[:num_bytes]
    memory[::_PAGE_BYTES] = 0
    return memory
