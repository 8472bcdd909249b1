"""The cache's bytes: one tensor `[num_blocks, block_bytes]`, whose layers worker.layer_cache views.

Owns the storage. Does not know which block belongs to whom: block numbers come with each plan, and
what is free or shared is decided elsewhere; nor what lies where in a block (KVLayout does).
"""

from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import torch

from rillgate_server.core.model_spec import KVLayout
from rillgate_server.errors import OutOfMemory
from rillgate_server.worker.host_memory import available_bytes
from rillgate_server.worker.layer_cache import view_layer


class KVStorage:
    """The device tier's memory.

    State: the bytes alone. Starts as zeros, and `clear` zeroes blocks before they are filled
    anew: what lies past a row's end is masked, but a NaN of a failed request would come through
    the mask as 0 * NaN and end its neighbours.
    """

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        """Reserve the memory (the system hands pages out as they are touched)."""
        needed_bytes, free_bytes = num_blocks * layout.block_bytes, available_bytes()
        if needed_bytes > free_bytes:
            raise OutOfMemory(f"a cache of {num_blocks} blocks", needed_bytes, free_bytes)
        self.layout = layout
        self.num_blocks = num_blocks
        # torch.zeros would write every page at once: seconds, and memory that nobody may ever use.
        pages = mmap(-1, needed_bytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        self._bytes = torch.frombuffer(pages, dtype=torch.uint8).view(num_blocks, -1)
        self.layers = tuple(view_layer(self._bytes, layout, layer) for layer in layout.layers)

    def __repr__(self) -> str:
        """Show the size."""
        return f"KVStorage(num_blocks={self.num_blocks}, block_bytes={self.layout.block_bytes})"

    def clear(self, blocks: list[int]) -> None:
        """Zero whole blocks."""
        for block in blocks:
            self._bytes[block].zero_()
