"""Attention over blocks by the C++ kernels: near float64's, and no row sees another."""

import pytest
import torch
from torch import Tensor

from rillgate_server.core.model_spec import KVLayout
from rillgate_server.worker.attention.base import PackedRow, PackedStep
from rillgate_server.worker.attention.paged_decode import can_attend
from rillgate_server.worker.attention.sdpa import SdpaAttention
from rillgate_server.worker.compute_device import CPU
from rillgate_server.worker.kernels.library import load_kernels
from rillgate_server.worker.kv_storage import KVStorage

HEADS = [(14, 2, 64, 64), (8, 8, 32, 16), (12, 2, 128, 128), (4, 4, 192, 128), (6, 1, 96, 80)]
"""(heads, heads of keys, key dim, value dim)."""
LENGTHS = (1, 2, 15, 16, 17, 100, 33)

pytestmark = pytest.mark.skipif(
    (kernels := load_kernels()) is None or not kernels.has_attention,
    reason="no C++ kernels for attention here",
)


def exact(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attend in float64. query: [heads, dim]; keys, values: [context, kv_heads, dim]."""
    group = len(query) // keys.shape[1]
    keys, values = (it.double().repeat_interleave(group, dim=1) for it in (keys, values))
    scores = torch.einsum("hd,thd->ht", query.double(), keys) * scaling
    return torch.einsum("ht,thd->hd", scores.softmax(dim=-1), values)


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("shape", HEADS)
def test_decode_rows_are_near_the_exact_result_and_alone_the_same(
    shape: tuple[int, int, int, int], window: int | None, block_size: int
) -> None:
    """Rows of many lengths whose blocks lie anywhere, beside a chunk; NaN in all other blocks."""
    torch.manual_seed(0)
    num_heads, num_kv_heads, key_dim, value_dim = shape
    layers = (((num_kv_heads, key_dim), (num_kv_heads, value_dim), window),)
    layout = KVLayout.build(block_size, "bfloat16", layers)
    assert can_attend(layout, CPU)
    storage = KVStorage(layout, 200)
    cache = storage.layers[0]
    cache.keys.tokens.fill_(torch.nan)
    cache.values.tokens.fill_(torch.nan)

    free = torch.randperm(200)
    rows: list[PackedRow] = []
    queries: list[Tensor] = []
    expected: list[Tensor] = []
    for length in LENGTHS:
        num_blocks = -(-length // block_size)
        blocks, free = free[:num_blocks], free[num_blocks:]
        table = torch.cat([blocks, blocks[:1].repeat(10)])
        at = torch.arange(length)
        where = blocks[at // block_size], at % block_size
        keys = torch.randn(length, num_kv_heads, key_dim).bfloat16()
        values = torch.randn(length, num_kv_heads, value_dim).bfloat16()
        cache.write(where, keys, values)
        rows.append(PackedRow(len(rows), length - 1, 1, table))
        queries.append((torch.randn(num_heads, key_dim) * 2).bfloat16())
        first = 0 if window is None else max(0, length - window)
        expected.append(exact(queries[-1], keys[first:], values[first:], 0.1))

    def attend(chosen: list[int]) -> Tensor:
        """Attend for some rows; the new key and value are those that are there already."""
        packed = [
            PackedRow(i, rows[at].start, 1, rows[at].block_table) for i, at in enumerate(chosen)
        ]
        starts = torch.tensor([row.start for row in packed])
        blocks = torch.stack([row.block_table[row.start // block_size] for row in packed])
        where = blocks, starts % block_size
        step = PackedStep(torch.zeros(len(packed)), starts, where, tuple(packed))
        key, value = cache.keys.tokens[where], cache.values.tokens[where]
        backend = SdpaAttention(storage, torch.bfloat16)
        query = torch.stack([queries[at] for at in chosen], dim=1)
        new = key.transpose(0, 1).clone(), value.transpose(0, 1).clone()
        return backend.prepare(step).attend(0, query, *new, 0.1)

    together = attend(list(range(len(rows))))
    for i, want in enumerate(expected):
        assert torch.allclose(together[i].double(), want, rtol=2**-7, atol=1e-4)
        assert torch.equal(attend([i])[0], together[i])
    assert torch.equal(attend([5, 0, 3]), together[[5, 0, 3]])


def test_other_caches_are_torch_s() -> None:
    """INT8 or float32 in the cache, and heads that do not fill vectors."""
    whole = ((2, 64), (2, 64), None)
    assert not can_attend(KVLayout.build(16, "float32", (whole,)), CPU)
    assert not can_attend(KVLayout.build(16, "int8", (whole,)), CPU)
    assert not can_attend(KVLayout.build(16, "bfloat16", (((2, 80), (2, 80), None),)), CPU)
    assert not can_attend(KVLayout.build(16, "bfloat16", (whole,)), torch.device("cuda"))
