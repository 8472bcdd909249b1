"""The attention against an obvious float64 loop, on random shapes, contexts and windows."""

import itertools
import math
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rillgate_server.core.model_spec import KVLayout
from rillgate_server.worker.attention.base import PackedRow, PackedStep
from rillgate_server.worker.attention.sdpa import SdpaAttention
from rillgate_server.worker.kv_storage import KVStorage

NUM_BLOCKS = 120


@dataclass(frozen=True)
class Shape:
    """One random case."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    window: int | None
    rows: tuple[tuple[int, int], ...]
    """(start, number of tokens) per row."""


def random_shape(rng: random.Random) -> Shape:
    """Draw heads, widths, block size, window and rows."""
    num_kv_heads = rng.choice([1, 2, 3])
    key_dim = rng.choice([8, 16, 24])
    return Shape(
        num_kv_heads * rng.choice([1, 2, 7]),
        num_kv_heads,
        key_dim,
        rng.choice([key_dim, key_dim // 2]),
        rng.choice([1, 4, 5, 16]),
        rng.choice([None, None, 1, 3, 10, 50]),
        tuple(
            (rng.choice([0, 0, 1, 7, 40]), rng.choice([1, 1, 1, 2, 9, 30]))
            for _ in range(rng.randint(1, 6))
        ),
    )


class Scene:
    """A cache with random contexts in random blocks, and a step over it."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, seed: int, kv_dtype: str | None = None
    ) -> None:
        """Write what is before each row's start; leave huge numbers everywhere else.

        The cache is of `kv_dtype`; None: the model's `dtype`.
        """
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        key_shape = (shape.num_kv_heads, shape.key_dim)
        value_shape = (shape.num_kv_heads, shape.value_dim)
        layer = (key_shape, value_shape, shape.window)
        other = (key_shape, value_shape, None if shape.window else 2)
        self.kv_dtype = kv_dtype or str(dtype).removeprefix("torch.")
        layout = KVLayout.build(shape.block_size, self.kv_dtype, (other, layer))
        num_blocks = sum(-(-(start + num) // shape.block_size) for start, num in shape.rows) + 3
        self.storage = KVStorage(layout, num_blocks)
        blocks = list(range(num_blocks))
        self.write(
            [(block, i) for block in blocks for i in range(shape.block_size)],
            torch.full((num_blocks * shape.block_size, *key_shape), 3e4).to(dtype),
            torch.full((num_blocks * shape.block_size, *value_shape), 3e4).to(dtype),
        )
        rng.shuffle(blocks)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(dtype)

        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.rows: list[PackedRow] = []
        new_at: list[tuple[int, int]] = []
        offset = 0
        for start, num_tokens in shape.rows:
            end = start + num_tokens
            own = [blocks.pop() for _ in range(-(-end // shape.block_size))]
            table = torch.tensor(own + [own[0]] * 900)
            self.rows.append(PackedRow(offset, start, num_tokens, table))
            self.keys.append(draw(end, *key_shape))
            self.values.append(draw(end, *value_shape))
            at = [(own[p // shape.block_size], p % shape.block_size) for p in range(end)]
            self.write(at[:start], self.keys[-1][:start], self.values[-1][:start])
            new_at.extend(at[start:])
            offset += num_tokens
        self.query = draw(shape.num_heads, offset, shape.key_dim)
        self.step = PackedStep(
            torch.zeros(offset, dtype=torch.int64),
            torch.zeros(offset, dtype=torch.int64),
            (torch.tensor([b for b, _ in new_at]), torch.tensor([o for _, o in new_at])),
            tuple(self.rows),
        )

    def write(self, at: list[tuple[int, int]], keys: Tensor, values: Tensor) -> None:
        """Store tokens at (block, offset in it)."""
        blocks = torch.tensor([block for block, _ in at], dtype=torch.int64)
        offsets = torch.tensor([offset for _, offset in at], dtype=torch.int64)
        self.storage.layers[1].write((blocks, offsets), keys, values)

    def new_tokens(self, per_row: list[Tensor]) -> Tensor:
        """Pack what the step brings, heads first."""
        packed = [tensor[row.start :] for tensor, row in zip(per_row, self.rows, strict=True)]
        return torch.cat(packed).transpose(0, 1)

    def expected(self, scaling: float) -> Tensor:
        """Attend with loops in float64. [num_tokens, num_heads, value_dim]."""
        shape = self.shape
        group = shape.num_heads // shape.num_kv_heads
        output = torch.zeros(self.query.shape[1], shape.num_heads, shape.value_dim).double()
        for row, keys, values in zip(self.rows, self.keys, self.values, strict=True):
            kept_keys, kept_values = kept(keys, self.kv_dtype), kept(values, self.kv_dtype)
            for i in range(row.num_tokens):
                seen = self.seen(row.start + i)
                for head in range(shape.num_heads):
                    scores = (
                        kept_keys[seen, head // group]
                        @ self.query[head, row.offset + i].double()
                        * scaling
                    )
                    output[row.offset + i, head] = (
                        torch.softmax(scores, 0) @ kept_values[seen, head // group]
                    )
        return output

    def seen(self, position: int) -> slice:
        """Return the positions that one attends to."""
        window = self.shape.window
        return slice(0 if window is None else max(0, position - window + 1), position + 1)

    def actual(self, scaling: float) -> Tensor:
        """Attend with the backend."""
        attention = SdpaAttention(self.storage, self.query.dtype)
        keys, values = self.new_tokens(self.keys), self.new_tokens(self.values)
        return attention.prepare(self.step).attend(1, self.query, keys, values, scaling)


def kept(vectors: Tensor, kv_dtype: str) -> Tensor:
    """Return what a cache keeps of vectors [..., dim], worked out one by one. float64."""
    if kv_dtype != "int8":
        return vectors.double()
    rows = vectors.flatten(0, -2).double()
    for row in rows:
        scale = float((row.abs().max() / 127).bfloat16())
        row.copy_(torch.round(row / scale) * scale)
    return rows.view(vectors.shape)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("seed", range(60))
def test_attention_agrees_with_float64(seed: int, kv_dtype: str) -> None:
    """Any mix of decode rows and chunks, any window, any grouping, strangers' blocks around.

    In INT8 every row reads what the cache keeps, its own new tokens included.
    """
    scene = Scene(random_shape(random.Random(seed)), torch.float32, seed, kv_dtype)
    scaling = 1 / math.sqrt(scene.shape.key_dim)
    torch.testing.assert_close(
        scene.actual(scaling).double(), scene.expected(scaling), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("seed", range(10))
def test_attention_in_bf16_stays_near_float64(seed: int, kv_dtype: str) -> None:
    """The same in bf16, within bf16's precision of values of size one."""
    scene = Scene(random_shape(random.Random(seed)), torch.bfloat16, seed, kv_dtype)
    torch.testing.assert_close(
        scene.actual(0.3).double(), scene.expected(0.3), rtol=0.05, atol=0.03
    )


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 200])
@pytest.mark.parametrize("rows", [((0, 300),), ((70, 129), (3, 1), (0, 128)), ((4000, 150),)])
def test_long_chunks_are_tiled(
    rows: tuple[tuple[int, int], ...],
    window: int | None,
    dtype: torch.dtype,
    kv_dtype: str | None,
) -> None:
    """Chunks of several tiles, contexts on both sides of the limit between the two ways."""
    scene = Scene(Shape(4, 2, 16, 8, 5, window, rows), dtype, 0, kv_dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(
        scene.actual(0.25).double(), scene.expected(0.25), rtol=tolerance, atol=tolerance
    )


def test_scores_in_the_hundreds_keep_float32s_precision() -> None:
    """As with Qwen2's biases: rounded to bf16 the scores would be off by one and more."""
    scene = Scene(Shape(4, 2, 16, 16, 4, None, ((0, 40), (40, 1), (20, 30))), torch.bfloat16, 0)
    scene.query += 8
    for keys, values, row in zip(scene.keys, scene.values, scene.rows, strict=True):
        keys += 8
        at = [(int(row.block_table[p // 4]), p % 4) for p in range(row.start)]
        scene.write(at, keys[: row.start], values[: row.start])
    scores = scene.query[0, 0].float() @ scene.keys[0][:, 0].float().T * 0.3
    assert scores.max() > 250
    torch.testing.assert_close(
        scene.actual(0.3).double(), scene.expected(0.3), rtol=0.05, atol=0.03
    )


def test_decode_rows_of_very_different_lengths_are_computed_in_groups() -> None:
    """Some short rows beside a long one: grouped, scattered back to their own places."""
    shape = Shape(4, 2, 16, 16, 4, None, ((900, 1), (3, 1), (880, 1), (0, 5), (450, 1), (2, 1)))
    scene = Scene(shape, torch.float32, 0)
    long_table = max(len(row.block_table) for row in scene.rows)
    rows = tuple(
        PackedRow(
            row.offset,
            row.start,
            row.num_tokens,
            torch.cat([row.block_table, row.block_table[:1].expand(long_table)])[:long_table],
        )
        for row in scene.rows
    )
    scene.step = PackedStep(
        scene.step.token_ids, scene.step.positions, scene.step.slot_mapping, rows
    )
    torch.testing.assert_close(
        scene.actual(0.2).double(), scene.expected(0.2), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_a_nan_in_a_neighbours_block_stays_there(kv_dtype: str) -> None:
    """Rows read their own blocks alone, so that a failed request cannot poison the batch."""
    shape = Shape(4, 2, 16, 16, 4, None, ((9, 1), (90, 1), (3, 1), (5, 6)))
    scene = Scene(shape, torch.float32, 0, kv_dtype)
    expected = scene.expected(0.2)
    own = {int(block) for row in scene.rows for block in row.block_table}
    poisoned = set(range(scene.storage.num_blocks)) - own | {int(scene.rows[1].block_table[0])}
    at = [(block, i) for block in poisoned for i in range(4)]
    nan = torch.full((len(at), 2, 16), torch.nan)
    scene.write(at, nan, nan)
    actual = scene.actual(0.2)
    assert actual[scene.rows[1].offset].isnan().all()
    for row in (scene.rows[0], scene.rows[2], scene.rows[3]):
        ours = slice(row.offset, row.offset + row.num_tokens)
        torch.testing.assert_close(actual[ours].double(), expected[ours], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_int8_moves_the_output_no_further_than_its_scales_allow(seed: int) -> None:
    """The bound: half a scale per element of a value, and what half a scale per element of every
    key can do to the scores, hence to the weights.

    With scores off by e at most, each weight is off by a factor of exp(2 e) at most.
    """
    scene = Scene(random_shape(random.Random(seed)), torch.float32, seed, "int8")
    scaling = 1 / math.sqrt(scene.shape.key_dim)
    actual = scene.actual(scaling).double()
    scene.kv_dtype = "float32"
    difference = (actual - scene.expected(scaling)).abs()
    group = scene.shape.num_heads // scene.shape.num_kv_heads
    for row, keys, values in zip(scene.rows, scene.keys, scene.values, strict=True):
        for i in range(row.num_tokens):
            seen = scene.seen(row.start + i)
            for head in range(scene.shape.num_heads):
                largest_key = float(keys[seen, head // group].abs().max())
                largest_value = float(values[seen, head // group].abs().max())
                query = scene.query[head, row.offset + i]
                score_error = float(query.abs().sum()) * scaling * half_a_scale(largest_key)
                bound = largest_value * math.expm1(2 * score_error) + half_a_scale(largest_value)
                assert difference[row.offset + i, head].max() <= bound + 1e-5
    assert difference.max() > 1e-4


def half_a_scale(largest: float) -> float:
    """Return half the scale of a vector with that largest magnitude, rounded up to bfloat16."""
    return largest / 127 * (1 + 2**-8) / 2


def test_int8_rows_do_not_hang_on_how_they_are_computed() -> None:
    """One request at once, in chunks, and token by token beside others: the same output.

    Read from the step instead of from the cache, a first chunk would differ by the rounding.
    """
    whole = Scene(Shape(4, 2, 16, 16, 4, None, ((0, 40),)), torch.float32, 0, "int8")
    at_once = whole.actual(0.3)
    assert (at_once.double() - whole.expected(0.3)).abs().max() < 1e-5
    for cuts in ((0, 7, 40), (0, 4, 16, 39, 40), tuple(range(41))):
        for start, end in itertools.pairwise(cuts):
            shape = Shape(4, 2, 16, 16, 4, None, ((start, end - start), (3, 1), (9, 5)))
            part = Scene(shape, torch.float32, 1, "int8")
            part.keys[0], part.values[0] = whole.keys[0][:end], whole.values[0][:end]
            part.query[:, : end - start] = whole.query[:, start:end]
            table = part.rows[0].block_table
            at = [(int(table[p // 4]), p % 4) for p in range(start)]
            part.write(at, part.keys[0][:start], part.values[0][:start])
            ours = part.actual(0.3)[: end - start]
            torch.testing.assert_close(ours, at_once[start:end], rtol=1e-5, atol=1e-6)
