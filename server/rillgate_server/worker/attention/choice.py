"""Which attention computes over a storage. Does not know how any of them works."""

import logging
from importlib import import_module

import torch

from rillgate_server.worker.attention.base import AttentionBackend
from rillgate_server.worker.attention.paged import PagedAttention, can_attend
from rillgate_server.worker.attention.sdpa import SdpaAttention
from rillgate_server.worker.kernels.library import load_kernels
from rillgate_server.worker.kv_storage import KVStorage

_log = logging.getLogger(__name__)


def make_attention(
    storage: KVStorage, dtype: torch.dtype, triton_heads: int | None = None
) -> AttentionBackend:
    """Take the kernels for a model of `dtype` where they are there and can, torch's else.

    `triton_heads`: heads of queries, where Triton works.
    """
    if triton_heads is not None:
        module = import_module("rillgate_server.worker.attention.triton_paged")
        backend: AttentionBackend = module.TritonPagedAttention(storage, triton_heads, dtype)
        return backend
    if can_attend(storage.layout, dtype, storage.bytes.device):
        kernels = load_kernels()
        if kernels is not None and kernels.has_attention:
            return PagedAttention(storage, kernels)
    return SdpaAttention(storage, dtype)


def triton_works(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device: it compiles them there, with a C compiler."""
    if device.type != "cuda":
        return False
    try:
        import_module("rillgate_server.worker.attention.triton_paged").try_kernels(device)
    except Exception as error:  # the border to a compiler, which may fail in any way
        _log.warning(
            "Triton does not work here, and a step will take several times as long: %s: %s",
            type(error).__name__,
            error,
        )
        return False
    return True
