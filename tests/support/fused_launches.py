"""Launches of the layers' kernels in the shapes of Qwen2.5-7B and 0.5B, and of Qwen3-8B.

`compile_launches("tests.support.fused_launches:launch_all")`
"""

import torch

from rillgate_server.core.model_spec import KVLayout
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.network.fused_kernels import add_norm, silu_mul
from rillgate_server.worker.network.rotary_kernel import HeadNorms, HeadShape, rotate_and_store

_NUM_TOKENS = 3
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SHAPES = (
    (3584, 18944, HeadShape(28, 4, 128), False),
    (896, 4864, HeadShape(14, 2, 64), False),
    (4096, 12288, HeadShape(32, 8, 128), True),
)
"""(hidden size, intermediate size, heads, whether heads are normed)."""


def launch_all() -> None:
    """Launch each kernel."""
    for dtype in _DTYPES:
        for hidden_size, intermediate_size, heads, has_norms in _SHAPES:
            residual, weight = torch.zeros(_NUM_TOKENS, hidden_size, dtype=dtype), torch.ones(8)
            for delta in (None, residual):
                add_norm(residual, delta, weight.to(dtype), 1e-6)
            silu_mul(torch.zeros(_NUM_TOKENS, 2 * intermediate_size, dtype=dtype))
            for kv_dtype in (str(dtype).removeprefix("torch."), "int8"):
                _rotate(heads, dtype, kv_dtype, has_norms=has_norms)


def _rotate(heads: HeadShape, dtype: torch.dtype, kv_dtype: str, *, has_norms: bool) -> None:
    shape = heads.num_kv_heads, heads.dim
    storage = KVStorage(KVLayout.build(16, kv_dtype, ((shape, shape, None),)), 2)
    weight = torch.ones(heads.dim, dtype=dtype)
    width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.dim
    rotate_and_store(
        torch.zeros(_NUM_TOKENS, width, dtype=dtype),
        (torch.ones(_NUM_TOKENS, heads.dim), torch.zeros(_NUM_TOKENS, heads.dim)),
        heads,
        HeadNorms(weight, weight, 1e-6) if has_norms else None,
        (torch.zeros(_NUM_TOKENS, dtype=torch.int64), torch.arange(_NUM_TOKENS)),
        storage.layers[0],
    )
