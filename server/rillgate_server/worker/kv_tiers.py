"""Both tiers where a worker computes: which memory each is in, and what copies between them."""

import torch

from rillgate_server.core.model_spec import KVLayout
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.kv_transfer import BlockCopier, MemoryCopier
from rillgate_server.worker.pinned_memory import pin_for_cuda
from rillgate_server.worker.stream_copier import StreamCopier


def reserve_tiers(
    layout: KVLayout, num_device_blocks: int, num_host_blocks: int, device: torch.device
) -> BlockCopier:
    """Reserve the device tier on `device` and the host tier; raises OutOfMemory.

    On a CPU both are in the same memory.
    """
    if device.type == "cuda":
        return StreamCopier(
            KVStorage(layout, num_device_blocks, device=device),
            KVStorage(layout, num_host_blocks, pin=pin_for_cuda),
        )
    storage = KVStorage(layout, num_device_blocks)
    host = KVStorage(layout, num_host_blocks, taken_bytes=storage.num_bytes)
    return MemoryCopier(storage, host)
