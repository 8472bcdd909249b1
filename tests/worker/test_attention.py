"""The attention against an obvious float64 loop, on random shapes, contexts and windows."""

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

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int) -> None:
        """Write what is before each row's start; leave huge numbers everywhere else."""
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        key_shape = (shape.num_kv_heads, shape.key_dim)
        value_shape = (shape.num_kv_heads, shape.value_dim)
        name = str(dtype).removeprefix("torch.")
        layer = (key_shape, value_shape, shape.window)
        other = (key_shape, value_shape, None if shape.window else 2)
        layout = KVLayout.build(shape.block_size, name, (other, layer))
        num_blocks = sum(-(-(start + num) // shape.block_size) for start, num in shape.rows) + 3
        self.storage = KVStorage(layout, num_blocks)
        cache = self.storage.layers[1]
        cache.keys.fill_(3e4)
        cache.values.fill_(3e4)
        blocks = list(range(num_blocks))
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
            for p in range(start):
                cache.keys[at[p]] = self.keys[-1][p]
                cache.values[at[p]] = self.values[-1][p]
            new_at.extend(at[start:])
            offset += num_tokens
        self.query = draw(shape.num_heads, offset, shape.key_dim)
        self.step = PackedStep(
            torch.zeros(offset, dtype=torch.int64),
            torch.zeros(offset, dtype=torch.int64),
            (torch.tensor([b for b, _ in new_at]), torch.tensor([o for _, o in new_at])),
            tuple(self.rows),
        )

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
            for i in range(row.num_tokens):
                position = row.start + i
                first = 0 if shape.window is None else max(0, position - shape.window + 1)
                for head in range(shape.num_heads):
                    k = keys[first : position + 1, head // group].double()
                    v = values[first : position + 1, head // group].double()
                    scores = k @ self.query[head, row.offset + i].double() * scaling
                    output[row.offset + i, head] = torch.softmax(scores, 0) @ v
        return output

    def actual(self, scaling: float) -> Tensor:
        """Attend with the backend."""
        attention = SdpaAttention(self.storage, self.query.dtype)
        keys, values = self.new_tokens(self.keys), self.new_tokens(self.values)
        return attention.prepare(self.step).attend(1, self.query, keys, values, scaling)


@pytest.mark.parametrize("seed", range(60))
def test_attention_agrees_with_float64(seed: int) -> None:
    """Any mix of decode rows and chunks, any window, any grouping, strangers' blocks around."""
    scene = Scene(random_shape(random.Random(seed)), torch.float32, seed)
    scaling = 1 / math.sqrt(scene.shape.key_dim)
    torch.testing.assert_close(
        scene.actual(scaling).double(), scene.expected(scaling), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("seed", range(10))
def test_attention_in_bf16_stays_near_float64(seed: int) -> None:
    """The same in bf16, within bf16's precision of values of size one."""
    scene = Scene(random_shape(random.Random(seed)), torch.bfloat16, seed)
    torch.testing.assert_close(
        scene.actual(0.3).double(), scene.expected(0.3), rtol=0.05, atol=0.03
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 200])
@pytest.mark.parametrize("rows", [((0, 300),), ((70, 129), (3, 1), (0, 128)), ((4000, 150),)])
def test_long_chunks_are_tiled(
    rows: tuple[tuple[int, int], ...], window: int | None, dtype: torch.dtype
) -> None:
    """Chunks of several tiles, contexts on both sides of the limit between the two ways."""
    scene = Scene(Shape(4, 2, 16, 8, 5, window, rows), dtype, 0)
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(
        scene.actual(0.25).double(), scene.expected(0.25), rtol=tolerance, atol=tolerance
    )


def test_scores_in_the_hundreds_keep_float32s_precision() -> None:
    """As with Qwen2's biases: rounded to bf16 the scores would be off by one and more."""
    scene = Scene(Shape(4, 2, 16, 16, 4, None, ((0, 40), (40, 1), (20, 30))), torch.bfloat16, 0)
    scene.query += 8
    for keys, row in zip(scene.keys, scene.rows, strict=True):
        keys += 8
        cache = scene.storage.layers[1]
        for position in range(row.start):
            block = int(row.block_table[position // 4])
            cache.keys[block, position % 4] = keys[position]
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


def test_a_nan_in_a_neighbours_block_stays_there() -> None:
    """Rows read their own blocks alone, so that a failed request cannot poison the batch."""
    shape = Shape(4, 2, 16, 16, 4, None, ((9, 1), (90, 1), (3, 1), (5, 6)))
    scene = Scene(shape, torch.float32, 0)
    expected = scene.expected(0.2)
    own = {int(block) for row in scene.rows for block in row.block_table}
    cache = scene.storage.layers[1]
    for block in set(range(scene.storage.num_blocks)) - own:
        cache.keys[block] = torch.nan
        cache.values[block] = torch.nan
    cache.keys[scene.rows[1].block_table[0]] = torch.nan
    actual = scene.actual(0.2)
    assert actual[scene.rows[1].offset].isnan().any()
    for row in (scene.rows[0], scene.rows[2], scene.rows[3]):
        ours = slice(row.offset, row.offset + row.num_tokens)
        torch.testing.assert_close(actual[ours].double(), expected[ours], rtol=1e-4, atol=1e-5)
