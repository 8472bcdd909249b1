"""Attention over blocks by the Triton kernels: near float64's, for any mix of rows, however long
contexts are cut, and in steps of fixed capacity. Without a GPU in Triton's interpreter."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from rillgate_server.core.model_spec import KVLayout
from rillgate_server.worker.attention import tiles
from rillgate_server.worker.attention.base import PackedRow, PackedStep
from rillgate_server.worker.attention.static_decode import StaticDecode
from rillgate_server.worker.attention.tiles import Rows, cut
from rillgate_server.worker.attention.triton_paged import TritonPagedAttention
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.layer_cache import Int8Vectors, quantize
from tests.support.gpu_compile import MAX_SHARED_BYTES, compile_launches
from tests.worker.test_attention import Scene, Shape, random_shape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class TritonScene(Scene):
    """A scene for these kernels."""

    def attention(self) -> TritonPagedAttention:
        """Make the backend, over a copy of the cache where it computes."""
        copy = KVStorage(self.storage.layout, self.storage.num_blocks, device=DEVICE)
        copy.bytes.copy_(self.storage.bytes)
        return TritonPagedAttention(copy, self.shape.num_heads, self.query.dtype)

    def actual(self, scaling: float) -> Tensor:
        """Attend with the backend; the cache then has what it has stored."""
        keys, values = self.new_tokens(self.keys), self.new_tokens(self.values)
        attention = self.attention()
        query, keys, values = (it.to(DEVICE) for it in (self.query, keys, values))
        step = attention.prepare(self.step.on(DEVICE))
        found = step.attend(1, query, keys, values, scaling).cpu()
        self.storage.bytes.copy_(attention.storage.bytes)
        return found

    def poison(self) -> None:
        """Leave NaN wherever no token of a row's context is."""
        own = {
            (int(row.block_table[p // self.shape.block_size]), p % self.shape.block_size)
            for row in self.rows
            for p in range(row.start)
        }
        at = [
            (block, i)
            for block in range(self.storage.num_blocks)
            for i in range(self.shape.block_size)
            if (block, i) not in own
        ]
        nan = [
            torch.full((len(at), self.shape.num_kv_heads, dim), torch.nan).to(self.query.dtype)
            for dim in (self.shape.key_dim, self.shape.value_dim)
        ]
        self.write(at, *nan)


@pytest.fixture
def cuts_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split contexts that are quick to compute."""
    monkeypatch.setattr(tiles, "MIN_DECODE_SPLIT", 64)
    monkeypatch.setattr(tiles, "_MIN_CHUNK_SPLIT", 64)


def near(scene: TritonScene, scaling: float, rtol: float, atol: float) -> None:
    """Compare with float64."""
    actual = scene.actual(scaling).double()
    torch.testing.assert_close(actual, scene.expected(scaling), rtol=rtol, atol=atol)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("seed", range(12))
def test_attention_agrees_with_float64(seed: int, kv_dtype: str) -> None:
    """Any mix of decode rows and chunks, any window, any grouping; NaN behind every context."""
    scene = TritonScene(random_shape(random.Random(seed)), torch.float32, seed, kv_dtype)
    scene.poison()
    near(scene, 1 / math.sqrt(scene.shape.key_dim), 1e-4, 1e-5)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("seed", range(4))
def test_attention_in_bf16_stays_near_float64(seed: int, kv_dtype: str) -> None:
    """The same in bf16, within bf16's precision of values of size one."""
    scene = TritonScene(random_shape(random.Random(seed)), torch.bfloat16, seed, kv_dtype)
    near(scene, 0.3, 0.05, 0.04)


@pytest.mark.usefixtures("cuts_short")
@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("window", [None, 1, 100])
def test_long_contexts_are_joined_from_parts(window: int | None, kv_dtype: str) -> None:
    """Decode rows and chunks of several splits beside short ones."""
    rows = ((400, 1), (3, 1), (210, 1), (0, 5), (300, 20), (63, 1), (64, 1))
    scene = TritonScene(Shape(6, 2, 16, 8, 5, window, rows), torch.float32, 0, kv_dtype)
    scene.poison()
    near(scene, 0.25, 1e-4, 1e-5)


@pytest.mark.usefixtures("cuts_short")
def test_a_row_has_the_same_bits_beside_any_others() -> None:
    """How a decode row is cut hangs on its own context alone."""
    alone = TritonScene(Shape(4, 2, 16, 16, 4, None, ((300, 1),)), torch.float32, 0)
    beside = TritonScene(
        Shape(4, 2, 16, 16, 4, None, ((300, 1), (90, 1), (0, 40), (700, 1))), torch.float32, 1
    )
    beside.keys[0], beside.values[0] = alone.keys[0], alone.values[0]
    beside.query[:, :1] = alone.query
    table = beside.rows[0].block_table
    at = [(int(table[p // 4]), p % 4) for p in range(300)]
    beside.write(at, alone.keys[0][:300], alone.values[0][:300])
    assert torch.equal(beside.actual(0.3)[0], alone.actual(0.3)[0])


def test_a_nan_in_a_neighbours_block_stays_there() -> None:
    """Rows read their own blocks alone, so that a failed request cannot poison the batch."""
    shape = Shape(4, 2, 16, 16, 4, None, ((9, 1), (90, 1), (3, 1), (5, 6)))
    for kv_dtype in ("float32", "int8"):
        scene = TritonScene(shape, torch.float32, 0, kv_dtype)
        expected = scene.expected(0.2)
        at = [(int(scene.rows[1].block_table[0]), i) for i in range(4)]
        scene.write(at, *[torch.full((4, 2, 16), torch.nan)] * 2)
        actual = scene.actual(0.2)
        assert actual[scene.rows[1].offset].isnan().all()
        for row in (scene.rows[0], scene.rows[2], scene.rows[3]):
            ours = slice(row.offset, row.offset + row.num_tokens)
            torch.testing.assert_close(actual[ours].double(), expected[ours], rtol=1e-4, atol=1e-5)


def test_vectors_are_kept_in_int8_as_they_are_defined() -> None:
    """Bit for bit, what is not finite and zeros included."""
    scene = TritonScene(Shape(4, 2, 24, 24, 4, None, ((0, 12),)), torch.float32, 0, "int8")
    keys = scene.keys[0]
    keys[1] = 0.0
    keys[2, 0, 3] = torch.nan
    keys[3, 1, 5] = -torch.inf
    keys[4] = 1e-45
    keys[5, 0] = torch.linspace(-127.5, 127.5, 24)
    scene.actual(0.2)
    vectors = scene.storage.layers[1].keys
    assert isinstance(vectors, Int8Vectors)
    integers, scales = quantize(keys)
    table = scene.rows[0].block_table
    at = table[torch.arange(12) // 4], torch.arange(12) % 4
    broken = ~scales.isfinite()
    assert torch.equal(~vectors.scales[at].isfinite(), broken)
    assert torch.equal(vectors.scales[at][~broken], scales[~broken])
    assert torch.equal(vectors.tokens[at][~broken], integers[~broken])


@pytest.mark.usefixtures("cuts_short")
@pytest.mark.parametrize("window", [None, 70])
def test_a_step_of_fixed_capacity_computes_what_a_fitting_one_does(window: int | None) -> None:
    """Filled again and again, with rows to spare that store nothing and keep what was there."""
    rows = ((400, 1), (3, 1), (210, 1))
    scene = TritonScene(Shape(6, 2, 16, 8, 5, window, rows), torch.float32, 0)
    expected = scene.expected(0.25)
    attention = scene.attention()
    static = StaticDecode(attention, 8, 1000)
    blocks = torch.full((4,), -1, device=DEVICE)
    mapping = blocks, torch.zeros(4, dtype=torch.int64, device=DEVICE)
    step = static.step(4, mapping)
    spare = torch.zeros(6, 1, 16)
    keys, values = scene.new_tokens(scene.keys), scene.new_tokens(scene.values)
    first, second = [
        [torch.cat([it, spare[: len(it), :, : it.shape[-1]]], dim=1) for it in (q, k, v)]
        for q, k, v in (
            (scene.query, keys, values),
            (scene.query[:, 1:2], keys[:, 1:2], values[:, 1:2]),
        )
    ]
    tables = [it.block_table[: -(-(it.start + 1) // 5)].numpy() for it in scene.rows]
    starts = np.array([it.start for it in scene.rows])
    for mapped, new in zip(mapping, scene.step.slot_mapping, strict=True):
        mapped[:3] = new
    kept = attention.storage.bytes.clone()
    assert static.fill(4, starts, tables)
    query, key, value = (it.to(DEVICE) for it in first)
    got = step.attend(1, query, key, value, 0.25)[:3].cpu()
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    again = TritonScene(Shape(6, 2, 16, 8, 5, window, rows), torch.float32, 0)
    again.actual(0.25)
    assert torch.equal(attention.storage.bytes.cpu(), again.storage.bytes)
    assert not torch.equal(attention.storage.bytes, kept)
    mapping[0][:] = -1
    mapping[0][:1], mapping[1][:1] = (it[1:2] for it in scene.step.slot_mapping)
    small = static.step(2, (mapping[0][:2], mapping[1][:2]))
    assert static.fill(2, starts[1:2], tables[1:2])
    query, key, value = (it[:, :2].to(DEVICE) for it in second)
    got = small.attend(1, query, key, value, 0.25)[:1].cpu()
    torch.testing.assert_close(got.double(), expected[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("cuts_short")
def test_a_step_that_has_no_room_says_so() -> None:
    """Many rows that share a long prefix have more splits than the cache has tokens for."""
    scene = TritonScene(Shape(4, 2, 16, 16, 4, None, ((400, 1),)), torch.float32, 0)
    static = StaticDecode(scene.attention(), 8, 1000)
    table = scene.rows[0].block_table[:101].numpy()
    static.step(8, scene.step.slot_mapping)
    assert not static.fill(8, np.full(8, 400), [table] * 8)
    assert static.fill(8, np.full(1, 400), [table])


def test_cutting_covers_every_key_of_every_query_once() -> None:
    """Whatever the rows and windows; parts are numbered through, and the longest come first."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        num_rows = int(rng.integers(1, 9))
        starts = rng.integers(0, 6000, num_rows)
        is_decode = bool(rng.integers(2))
        counts = np.ones(num_rows, int) if is_decode else rng.integers(2, 300, num_rows)
        window = None if rng.integers(2) else int(rng.integers(1, 3000))
        offsets = np.cumsum(counts) - counts
        queries, heads = (1, 4) if is_decode else (16, int(rng.integers(1, 9)))
        of = cut(
            Rows(offsets, starts, counts, offsets), queries, heads, window, is_decode=is_decode
        )
        covered: dict[int, list[tuple[int, int]]] = {}
        parts = []
        for token, num, start, table_at, first, end, part in of.items.T:
            row = int(np.flatnonzero(offsets == table_at)[0])
            assert start - starts[row] == token - offsets[row]
            assert end > first
            for query in range(num):
                covered.setdefault(int(token + query), []).append((int(first), int(end)))
            parts += [] if part < 0 else [int(part)]
        assert sorted(parts) == list(range(of.num_parts))
        assert sorted(covered) == list(range(int(counts.sum())))
        for token, ranges in covered.items():
            row = int(np.searchsorted(offsets, token, side="right")) - 1
            position = int(starts[row] + token - offsets[row])
            ranges.sort()
            assert ranges[0][0] <= (0 if window is None else max(0, position - window + 1))
            assert ranges[-1][1] > position
            assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
            assert len(ranges) <= tiles.MAX_PARTS + 1
        assert int(of.joins[3].sum()) == of.num_parts


def launch_all() -> None:
    """Launch the kernels in real models' shapes (for compile_launches)."""
    shapes = [(28, 4, 128), (14, 2, 64), (64, 8, 128), (6, 1, 80)]
    cases = [
        (s, t, k)
        for s in shapes
        for t, k in (
            (torch.bfloat16, "bfloat16"),
            (torch.bfloat16, "int8"),
            (torch.float16, "float16"),
        )
    ]
    cases += [
        ((28, 4, 128), torch.float32, "float32"),
        ((16, 16, 192), torch.bfloat16, "bfloat16"),
        ((16, 16, 192), torch.float32, "float32"),
    ]
    for (num_heads, heads, dim), dtype, kv_dtype in cases:
        value_dim = 128 if dim == 192 else dim
        layout = KVLayout.build(16, kv_dtype, (((heads, dim), (heads, value_dim), None),))
        storage = KVStorage(layout, 200)
        attention = TritonPagedAttention(storage, num_heads, dtype)
        table = torch.arange(200)
        rows = (PackedRow(0, 2000, 1, table), PackedRow(1, 2000, 100, table))
        where = torch.zeros(101, dtype=torch.int64)
        step = attention.prepare(PackedStep(where, where, (where, where), rows))
        q, k, v = (
            torch.zeros(n, 101, d, dtype=dtype)
            for n, d in ((num_heads, dim), (heads, dim), (heads, value_dim))
        )
        step.attend(0, q, k, v, 0.1)


def test_the_kernels_compile_for_a_gpu() -> None:
    """For real models' heads, in all types; within its shared memory and without spilling."""
    compiled = compile_launches("tests.worker.test_triton_paged:launch_all")
    assert {it.name for it in compiled} == {"attend", "join", "store_vectors"}
    for it in compiled:
        assert it.shared_bytes <= MAX_SHARED_BYTES, it
        # In float32, which checks compute in and hardly anybody else, tiles are a tight fit.
        assert it.spilled_bytes <= (16 if it.constants.get("KEYS") != "32" else 1000), it


def launch_many_steps() -> None:
    """Launch steps of many sizes, each over its own arrays, and a captured one's."""
    layout = KVLayout.build(16, "bfloat16", (((4, 128), (4, 128), None),))
    attention = TritonPagedAttention(KVStorage(layout, 700), 28, torch.bfloat16)
    table = torch.arange(700)
    query, key = (torch.zeros(n, 300, 128, dtype=torch.bfloat16) for n in (28, 4))
    where = torch.zeros(300, dtype=torch.int64)
    for num_decode in (0, 1, 3, 16):
        for num_chunk in (0, 1, 16, 33):
            rows = [PackedRow(i, 900 * (i % 8), 1, table) for i in range(num_decode)]
            if num_chunk > 1:
                rows.append(PackedRow(num_decode, 2000, num_chunk, table))
            if rows:
                step = attention.prepare(PackedStep(where, where, (where, where), tuple(rows)))
                step.attend(0, query, key, key, 0.1)
    static = StaticDecode(attention, 24, 4000)
    for num_rows in (1, 8, 17, 24):
        static.step(num_rows, (where, where)).attend(0, query, key, key, 0.1)


def test_no_step_compiles_what_another_one_has_compiled() -> None:
    """A kernel takes a second to compile: none may be compiled anew for another number of rows."""
    names = [it.name for it in compile_launches("tests.worker.test_triton_paged:launch_many_steps")]
    assert sorted(names) == ["attend", "attend", "join", "join", "store_vectors"]
