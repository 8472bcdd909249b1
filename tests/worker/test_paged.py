"""Attention over blocks by the C++ kernels: near float64's, and no token sees how it is computed.

The reference reads what the cache keeps, one token and head after another.
"""

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rillgate_server.core.model_spec import KVLayout
from rillgate_server.worker.attention.base import PackedRow, PackedStep
from rillgate_server.worker.attention.choice import make_attention
from rillgate_server.worker.attention.paged import PagedAttention, can_attend
from rillgate_server.worker.attention.sdpa import SdpaAttention
from rillgate_server.worker.compute_device import CPU
from rillgate_server.worker.kernels.library import load_kernels
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.layer_cache import Int8Vectors, quantize

HEADS = [(14, 2, 64, 64), (8, 8, 32, 16), (12, 2, 128, 128), (4, 4, 192, 128), (6, 1, 96, 80)]
"""(heads, heads of keys, key dim, value dim)."""
SCALING = 0.1

needs_kernels = pytest.mark.skipif(
    (kernels := load_kernels()) is None or not kernels.has_attention,
    reason="no C++ kernels for attention here",
)
Cut = tuple[int, int, int]
"""(sequence, first position, number of tokens) of a row."""


class Scene:
    """Sequences of some lengths whose blocks lie anywhere; NaN in all other blocks."""

    def __init__(
        self,
        heads: tuple[int, int, int, int],
        lengths: Sequence[int],
        *,
        kv_dtype: str = "bfloat16",
        window: int | None = None,
        block_size: int = 16,
        seed: int = 0,
    ) -> None:
        """Draw queries, keys and values of all positions."""
        torch.manual_seed(seed)
        num_heads, self.num_kv_heads, key_dim, value_dim = heads
        self.window, self.block_size = window, block_size
        shapes = ((self.num_kv_heads, key_dim), (self.num_kv_heads, value_dim), window)
        layout = KVLayout.build(block_size, kv_dtype, (shapes,))
        num_blocks = sum(-(-length // block_size) for length in lengths) + 3
        self.storage = KVStorage(layout, num_blocks)
        self.storage.bytes.fill_(0xFF)  # NaN in bf16
        free = torch.randperm(num_blocks)
        self.tables: list[Tensor] = []
        for length in lengths:
            own, free = free.tensor_split([-(-length // block_size)])
            self.tables.append(torch.cat([own, own[:1].repeat(10)]))
        self.queries = [(torch.randn(num_heads, n, key_dim) * 2).bfloat16() for n in lengths]
        self.keys = [torch.randn(self.num_kv_heads, n, key_dim).bfloat16() for n in lengths]
        self.values = [torch.randn(self.num_kv_heads, n, value_dim).bfloat16() for n in lengths]
        for i, length in enumerate(lengths):
            at = torch.arange(length)
            where = self.tables[i][at // block_size], at % block_size
            keys, values = self.keys[i].transpose(0, 1), self.values[i].transpose(0, 1)
            self.storage.layers[0].write(where, keys, values)

    def attend(self, cuts: Sequence[Cut]) -> list[Tensor]:
        """Compute one step. Returns [number of tokens, heads, value_dim] per row."""
        rows, where, offset = [], [], 0
        for sequence, start, num_tokens in cuts:
            rows.append(PackedRow(offset, start, num_tokens, self.tables[sequence]))
            at = torch.arange(start, start + num_tokens)
            where.append((self.tables[sequence][at // self.block_size], at % self.block_size))
            offset += num_tokens
        slots = torch.cat([blocks for blocks, _ in where]), torch.cat([of for _, of in where])
        step = PackedStep(torch.zeros(offset), torch.zeros(offset), slots, tuple(rows))

        def packed(of: list[Tensor]) -> Tensor:
            return torch.cat([of[i][:, start : start + n] for i, start, n in cuts], dim=1)

        attention = make_attention(self.storage, torch.bfloat16)
        assert isinstance(attention, PagedAttention)
        new = packed(self.queries), packed(self.keys), packed(self.values)
        output = attention.prepare(step).attend(0, *new, SCALING)
        return list(output.split([n for _, _, n in cuts]))

    def expected(self, sequence: int, position: int) -> tuple[Tensor, Tensor]:
        """Attend in float64, and bound what rounding may do. Both [heads, value_dim]."""
        first = 0 if self.window is None else max(0, position - self.window + 1)
        query = self.queries[sequence][:, position].double()
        keys, values = (
            kept(of[sequence][:, first : position + 1], self.storage.layout.kv_dtype)
            .double()
            .repeat_interleave(len(query) // self.num_kv_heads, dim=0)
            for of in (self.keys, self.values)
        )
        scores = torch.einsum("hd,htd->ht", query, keys) * SCALING
        weights = scores.softmax(dim=-1)
        output = torch.einsum("ht,htd->hd", weights, values)
        # Weights are rounded to 8 bits: each is off by 2^-8 of itself at most; so is the output.
        size = torch.einsum("ht,htd->hd", weights, values.abs())
        return output, 2**-8 * (size + output.abs()) * 1.01 + 1e-5


def kept(vectors: Tensor, kv_dtype: str) -> Tensor:
    """Return what a cache keeps of vectors [..., dim]."""
    if kv_dtype != "int8":
        return vectors
    integers, scales = quantize(vectors)
    return integers.double() * scales[..., None].double()


def assert_near(scene: Scene, cuts: Sequence[Cut]) -> None:
    """Compare all tokens of a step with float64."""
    for (sequence, start, num_tokens), output in zip(cuts, scene.attend(cuts), strict=True):
        for i in range(num_tokens):
            expected, bound = scene.expected(sequence, start + i)
            off = (output[i].double() - expected).abs()
            assert bool((off <= bound).all()), (sequence, start + i, float((off / bound).max()))


@needs_kernels
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("seed", range(12))
def test_any_mix_of_rows_is_near_the_exact_result(seed: int, kv_dtype: str) -> None:
    """Decode rows, drafts' rows and chunks of random lengths, windows and blocks."""
    rng = random.Random(seed)
    lengths = [rng.choice([1, 2, 15, 17, 33, 64, 65, 100, 190, 300]) for _ in range(5)]
    scene = Scene(
        HEADS[seed % len(HEADS)],
        lengths,
        kv_dtype=kv_dtype,
        window=rng.choice([None, None, 1, 16, 70]),
        block_size=rng.choice([4, 5, 16, 32]),
        seed=seed,
    )
    counts = [min(length, rng.choice([1, 1, 2, 5, 40, 300])) for length in lengths]
    assert_near(
        scene,
        [(i, n - count, count) for i, (n, count) in enumerate(zip(lengths, counts, strict=True))],
    )


@needs_kernels
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("window", [None, 1500])
def test_long_contexts_are_split_and_near_the_exact_result(
    window: int | None, kv_dtype: str
) -> None:
    """Over the borders of splits, one row at a time, which several threads share, and several."""
    scene = Scene((14, 2, 64, 64), [1023, 1024, 1025, 2600], window=window, kv_dtype=kv_dtype)
    cuts = [(0, 1022, 1), (1, 1020, 4), (2, 1024, 1), (3, 2590, 10), (3, 1000, 40)]
    for cut in cuts:
        assert_near(scene, [cut])
    assert_near(scene, cuts)


@needs_kernels
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("heads", HEADS)
def test_tokens_do_not_hang_on_cuts_or_neighbours(
    heads: tuple[int, int, int, int], window: int | None, kv_dtype: str
) -> None:
    """At once, in chunks, token by token, beside others: the very same bits."""
    scene = Scene(heads, [150, 33, 70], window=window, kv_dtype=kv_dtype)
    (at_once,) = scene.attend([(0, 0, 150)])
    for cuts in ((0, 7, 64, 150), (0, 100, 101, 103, 108, 150), (0, *range(120, 151))):
        for start, end in itertools.pairwise(cuts):
            rows = [(1, 32, 1), (0, start, end - start), (2, 10, 60)]
            assert torch.equal(scene.attend(rows)[1], at_once[start:end])


@needs_kernels
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_long_contexts_do_not_hang_on_who_computes_which_split(
    kv_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row alone, whose splits go to different threads, and in a batch that one thread's are."""
    scene = Scene((4, 2, 64, 64), [3000, 20], kv_dtype=kv_dtype, window=2100)
    drafts = (0, 2992, 8)
    alone = scene.attend([drafts])[0]
    together = scene.attend([*[(1, i, 1) for i in range(20)], drafts])[-1]
    assert torch.equal(alone, together)
    for i in range(8):
        assert torch.equal(scene.attend([(0, 2992 + i, 1)])[0][0], alone[i])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert torch.equal(scene.attend([drafts])[0], alone)


@needs_kernels
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_new_tokens_are_stored_as_the_cache_defines_it(kv_dtype: str) -> None:
    """What LayerCache.write stores, zeros, tiny, huge and infinite vectors and NaN included."""
    scene = Scene((6, 3, 32, 48), [40], kv_dtype=kv_dtype)
    factors = torch.tensor([1.0, 0.0, 1e-38, 1e-40, 1e38, 1e-30, 3e4, 5.0])
    for of in (scene.keys[0], scene.values[0]):
        of *= factors.repeat(5)[None, :, None].bfloat16()
    scene.keys[0][0, 7, 3] = torch.inf
    scene.keys[0][1, 8, 5] = torch.nan
    expected = KVStorage(scene.storage.layout, scene.storage.num_blocks)
    for storage in (scene.storage, expected):
        storage.bytes.zero_()
    scene.attend([(0, 0, 40)])
    at = torch.arange(40)
    where = scene.tables[0][at // 16], at % 16
    expected.layers[0].write(where, scene.keys[0].transpose(0, 1), scene.values[0].transpose(0, 1))
    ours, theirs = scene.storage.layers[0], expected.layers[0]
    for found, wanted in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
        assert torch.allclose(found.tokens, wanted.tokens, rtol=0, atol=0, equal_nan=True)
        if isinstance(found, Int8Vectors) and isinstance(wanted, Int8Vectors):
            assert torch.allclose(found.scales, wanted.scales, rtol=0, atol=0, equal_nan=True)
    assert kv_dtype != "int8" or isinstance(ours.keys, Int8Vectors)


@needs_kernels
def test_scores_in_the_hundreds_keep_float32s_precision() -> None:
    """As with Qwen2's biases: rounded to bf16 the scores would be off by one and more."""
    scene = Scene((4, 2, 64, 64), [150])
    scene.queries[0] += 8
    scene.keys[0] += 8
    assert (scene.queries[0][0, 0].float() @ scene.keys[0][0, 0].float()) * SCALING > 250
    scene.attend([(0, 0, 150)])  # which stores them
    assert_near(scene, [(0, 0, 150)])


@needs_kernels
def test_a_nan_stays_with_its_request() -> None:
    """One request's NaN ends it and nobody else."""
    scene = Scene((4, 2, 64, 64), [50, 60])
    rows = [(0, 49, 1), (1, 50, 10)]
    clean = scene.attend(rows)
    scene.values[0][:, 10] = torch.nan
    scene.attend([(0, 0, 50)])
    ours, others = scene.attend(rows)
    assert bool(ours.isnan().all())
    assert torch.equal(others, clean[1])


def test_other_caches_are_torch_s() -> None:
    """float32 in the cache or the model, and heads that do not fill vectors."""
    whole = ((2, 64), (2, 64), None)
    bf16 = torch.bfloat16
    assert can_attend(KVLayout.build(16, "int8", (whole,)), bf16, CPU)
    assert not can_attend(KVLayout.build(16, "int8", (whole,)), torch.float32, CPU)
    assert not can_attend(KVLayout.build(16, "float32", (whole,)), bf16, CPU)
    narrow = KVLayout.build(16, "bfloat16", (((2, 80), (2, 80), None),))
    assert not can_attend(narrow, bf16, CPU)
    assert not can_attend(KVLayout.build(16, "bfloat16", (whole,)), bf16, torch.device("cuda"))
    assert isinstance(make_attention(KVStorage(narrow, 1), bf16), SdpaAttention)
