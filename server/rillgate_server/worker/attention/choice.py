"""Which attention computes over a storage. Does not know how any of them works."""

import torch

from rillgate_server.worker.attention.base import AttentionBackend
from rillgate_server.worker.attention.paged import PagedAttention, can_attend
from rillgate_server.worker.attention.sdpa import SdpaAttention
from rillgate_server.worker.kernels.library import load_kernels
from rillgate_server.worker.kv_storage import KVStorage


def make_attention(storage: KVStorage, dtype: torch.dtype) -> AttentionBackend:
    """Take the C++ kernels for a model of `dtype` where they are there and can, torch's else."""
    if can_attend(storage.layout, dtype, storage.bytes.device):
        kernels = load_kernels()
        if kernels is not None and kernels.has_attention:
            return PagedAttention(storage, kernels)
    return SdpaAttention(storage, dtype)
