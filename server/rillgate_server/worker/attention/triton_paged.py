"""Attention straight over block tables on NVIDIA GPUs: nothing is gathered.

Owns what a step looks like to the Triton kernels (attention.paged_kernels), in device memory: how
its rows are cut (attention.tiles), its block tables, and the room for parts. Does not know the
model around it.

    one array of int32:   counts | per window: items, joins of decode rows, of chunks | block tables

A step made by `prepare` has arrays of its own size; attention.static_decode has them at fixed
places, for CUDA graphs.

Imported only where there is a GPU, or Triton's interpreter (tests).
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
from torch import Tensor

from rillgate_server.core.model_spec import INT8
from rillgate_server.worker.attention.base import PackedStep
from rillgate_server.worker.attention.paged_kernels import attend, join, store_vectors
from rillgate_server.worker.attention.tiles import (
    KEYS_PER_STEP,
    Cut,
    Ints,
    Rows,
    cut,
)
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.layer_cache import (
    CachedVectors,
    ExactVectors,
    Int8Vectors,
    LayerCache,
    SlotMapping,
)

_MIN_LINES = 16
"""Of a tile: what a product takes on the matrix units."""
_CHUNK_LINES = 128
_MAX_PROGRAMS = 1024
"""For a head of keys; four heads then have ten for each place on an H200's multiprocessors."""
_MAX_STAGED_BYTES = 96 * 1024
"""Of the keys and values on their way to a program: two programs then fit a multiprocessor, whose
shared memory is 228 KB, and what they read is more than is under way at full bandwidth."""


@dataclass(frozen=True, slots=True)
class _Tile:
    """How the kernels cut rows of one kind."""

    queries: int
    group_lines: int
    part_lines: int
    num_warps: int
    num_stages: int
    keys: int


@dataclass(frozen=True, slots=True)
class Pieces:
    """The items and joins of rows of one kind, for one window, on the device."""

    items: Tensor
    """[7, items there is room for], int32."""
    joins: Tensor
    """[4, joins there is room for], int32."""
    counts: Tensor
    """[2], int32: items and joins that there are."""
    tile: _Tile


@dataclass(frozen=True, slots=True)
class Parts:
    """Room for what items leave behind; the layers use it one after another."""

    found: Tensor
    """[elements], float32."""
    sums: Tensor
    """[elements], float32."""


class TritonPagedAttention:
    """The backend: holds the storage (AttentionBackend). State: none.

    Every query head count that is a multiple of the key heads' will do, in any floating type.
    """

    def __init__(self, storage: KVStorage, num_heads: int, dtype: torch.dtype) -> None:
        """Attend over a storage on a GPU, for a model of `dtype` with so many query heads."""
        self.storage = storage
        self.device = storage.bytes.device
        self.dtype = dtype
        layers = storage.layout.layers
        shape = storage.layers[0].keys.shape_per_token
        self.num_kv_heads = shape[0]
        self.group = num_heads // shape[0]
        self.value_dim = storage.layers[0].values.shape_per_token[-1]
        self.windows = tuple(dict.fromkeys(layer.window_tokens for layer in layers))
        self.window_of = tuple(self.windows.index(layer.window_tokens) for layer in layers)
        row_bytes = dtype.itemsize * (_padded(shape[1]) + _padded(self.value_dim))
        self.decode_tile = self._tile(_MIN_LINES, row_bytes, is_decode=True)
        self.chunk_tile = self._tile(_CHUNK_LINES, row_bytes, is_decode=False)

    def prepare(self, step: PackedStep) -> "TritonStep":
        """Cut the rows and put all that the kernels need onto the device, in one copy."""
        block_size = self.storage.layout.block_size_tokens
        tables = [
            row.block_table[: -(-(row.start + row.num_tokens) // block_size)].numpy()
            for row in step.rows
        ]
        of = np.array([(row.offset, row.start, row.num_tokens) for row in step.rows]).T
        return self.prepare_runs((of[0], of[1], of[2]), tables, step.slot_mapping)

    def prepare_runs(
        self, runs: tuple[Ints, Ints, Ints], tables: list[Ints], slot_mapping: SlotMapping
    ) -> "TritonStep":
        """Do the same for runs of (offset in the step, start, number of tokens), with each one's
        blocks up to its last position; slot_mapping: on the device."""
        lengths = np.array([len(table) for table in tables])
        of = np.stack([*runs, np.cumsum(lengths) - lengths])
        is_decode = of[2] == 1
        builder = _Builder(self)
        builder.add_rows(Rows(*of[:, is_decode]), is_decode=True)
        builder.add_rows(Rows(*of[:, ~is_decode]), is_decode=False)
        return builder.build(np.concatenate(tables), slot_mapping)

    def new_parts(self, num_decode: int, num_chunk: int) -> Parts:
        """Reserve room for so many parts of each kind."""
        num_lines = self.num_kv_heads * max(
            num_decode * self.decode_tile.part_lines, num_chunk * self.chunk_tile.part_lines, 1
        )
        return Parts(
            torch.empty(num_lines * self.value_dim, device=self.device),
            torch.empty(num_lines, device=self.device),
        )

    def cut_rows(self, rows: Rows, *, is_decode: bool) -> list[Cut]:
        """Cut rows of one kind, for each window."""
        tile = self.decode_tile if is_decode else self.chunk_tile
        return [
            cut(rows, tile.queries, self.num_kv_heads, window, is_decode=is_decode)
            for window in self.windows
        ]

    def _tile(self, lines: int, row_bytes: int, *, is_decode: bool) -> _Tile:
        """Size a tile for the heads' group, and so that three steps of keys fit."""
        group_lines = triton.next_power_of_2(self.group)
        keys = KEYS_PER_STEP
        while keys > 16 and 2 * keys * row_bytes > _MAX_STAGED_BYTES:
            keys //= 2
        if row_bytes > 1024:  # float32, or very wide heads: more does not fit
            lines = min(lines, 32)
        queries = max(1, lines // group_lines)
        num_stages = 4 if row_bytes >= 1024 and not is_decode else 5
        return _Tile(
            queries,
            group_lines,
            self.group if is_decode else queries * self.group,
            4 if queries * group_lines <= 32 else 8,
            num_stages,
            keys,
        )


class _Builder:
    """Gathers the pieces of a step, then puts them onto the device together."""

    def __init__(self, attention: TritonPagedAttention) -> None:
        self._attention = attention
        self._kinds: list[tuple[_Tile, list[Cut]]] = []
        self._num_parts = [0, 0]

    def add_rows(self, rows: Rows, *, is_decode: bool) -> None:
        """Add rows of one kind, if there are any."""
        if len(rows.offset):
            cuts = self._attention.cut_rows(rows, is_decode=is_decode)
            tile = self._attention.decode_tile if is_decode else self._attention.chunk_tile
            self._kinds.append((tile, cuts))
            self._num_parts[not is_decode] = max(it.num_parts for it in cuts)

    def build(self, tables: Ints, slot_mapping: SlotMapping) -> "TritonStep":
        """Return the step."""
        arrays: list[Ints] = []
        for _, cuts in self._kinds:
            for it in cuts:
                arrays += [np.array([it.items.shape[1], it.joins.shape[1]]), it.items, it.joins]
        flat = np.concatenate([*(it.ravel() for it in arrays), tables])
        staged = pinned_int32(flat.size, self._attention.device)
        staged.numpy()[:] = flat
        sizes = [it.size for it in arrays] + [tables.size]
        places = iter(staged.to(self._attention.device, non_blocking=True).split(sizes))
        pieces = tuple(
            tuple(
                Pieces(
                    counts=next(places),
                    items=next(places).view(it.items.shape),
                    joins=next(places).view(it.joins.shape),
                    tile=tile,
                )
                for it in cuts
            )
            for tile, cuts in self._kinds
        )
        return TritonStep(
            self._attention,
            pieces,
            next(places),
            slot_mapping,
            self._attention.new_parts(*self._num_parts),
        )


class TritonStep:
    """One step's attention (AttentionStep, ReadingStep). State: none."""

    def __init__(
        self,
        attention: TritonPagedAttention,
        kinds: tuple[tuple[Pieces, ...], ...],
        tables: Tensor,
        slot_mapping: SlotMapping,
        parts: Parts,
    ) -> None:
        """Take the pieces of each kind of rows, by window."""
        self._attention = attention
        self._kinds = kinds
        self._tables = tables
        self._parts = parts
        self.slot_mapping = slot_mapping

    def cache(self, layer_index: int) -> LayerCache:
        """Return where a layer's keys and values are kept (ReadingStep.cache)."""
        return self._attention.storage.layers[layer_index]

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Store, then attend (AttentionStep.attend)."""
        cache = self.cache(layer_index)
        _store(cache.keys, key, self.slot_mapping)
        _store(cache.values, value, self.slot_mapping)
        return self.read(layer_index, query.transpose(0, 1), scaling)

    def read(self, layer_index: int, query: Tensor, scaling: float) -> Tensor:
        """Attend to what is stored (ReadingStep.read)."""
        assert query.stride(-1) == 1
        of = self._attention
        output = query.new_empty(len(query), query.shape[1], of.value_dim)
        window = of.window_of[layer_index]
        for kind in self._kinds:
            self._read(kind[window], layer_index, query, output, scaling)
        return output

    def _read(
        self, pieces: Pieces, layer_index: int, query: Tensor, output: Tensor, scaling: float
    ) -> None:
        """Attend with the rows of one kind."""
        of, tile = self._attention, pieces.tile
        keys, values = self.cache(layer_index).keys, self.cache(layer_index).values
        key_scales, key_scale_stride = _scales(keys)
        value_scales, value_scale_stride = _scales(values)
        key_dim = keys.shape_per_token[-1]
        shape = {
            "HEADS": of.num_kv_heads,
            "GROUP": of.group,
            "GROUP_LINES": tile.group_lines,
            "QUERIES": tile.queries,
            "PART_LINES": tile.part_lines,
        }
        attend[min(pieces.items.shape[1], _MAX_PROGRAMS), of.num_kv_heads](
            query,
            keys.tokens,
            key_scales,
            values.tokens,
            value_scales,
            self._tables,
            pieces.items,
            pieces.counts,
            output,
            self._parts.found,
            self._parts.sums,
            scaling,
            of.windows[of.window_of[layer_index]] or 0,
            pieces.items.shape[1],
            query.stride(0),
            query.stride(1),
            keys.tokens.stride(0),
            key_scale_stride,
            values.tokens.stride(0),
            value_scale_stride,
            **shape,
            KEY_DIM=key_dim,
            KEY_PADDED=_padded(key_dim),
            VALUE_DIM=of.value_dim,
            VALUE_PADDED=_padded(of.value_dim),
            BLOCK_SIZE=of.storage.layout.block_size_tokens,
            KEYS=tile.keys,
            IS_INT8=of.storage.layout.kv_dtype == INT8,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if pieces.joins.shape[1]:
            self._join(pieces, output, shape)

    def _join(self, pieces: Pieces, output: Tensor, shape: dict[str, int]) -> None:
        """Join what tiles of several items have left."""
        of = self._attention
        join[pieces.joins.shape[1], of.num_kv_heads](
            self._parts.found,
            self._parts.sums,
            pieces.joins,
            pieces.counts[1:],
            output,
            pieces.joins.shape[1],
            **shape,
            DIM=of.value_dim,
            PADDED=_padded(of.value_dim),
            num_warps=pieces.tile.num_warps,
        )


def try_kernels(device: torch.device) -> None:
    """Launch one of them, to see whether they can be; raises whatever goes wrong."""
    vectors = torch.ones(1, 1, 16, device=device)
    kept = ExactVectors((1, 16), torch.zeros(1, 1, 1, 16, device=device), vectors[0])
    where = torch.zeros(1, dtype=torch.int64, device=device)
    _store(kept, vectors, (where, where))
    assert bool(torch.equal(kept.tokens.view(-1), vectors.view(-1)))


def pinned_int32(size: int, device: torch.device) -> Tensor:
    """Return host memory for an array that is to be copied to a device; torch keeps it for the
    copy, and hands it out again after."""
    return torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")


def _store(vectors: CachedVectors, new: Tensor, slot_mapping: SlotMapping) -> None:
    """Store new tokens. new: [num_kv_heads, num_tokens, dim], of any strides but the last."""
    num_heads, dim = vectors.shape_per_token
    assert new.stride(-1) == 1
    scales, scale_stride = _scales(vectors)
    blocks, offsets = slot_mapping
    store_vectors[new.shape[1], num_heads](
        new,
        vectors.tokens,
        scales,
        blocks,
        offsets,
        new.stride(0),
        new.stride(1),
        vectors.tokens.stride(0),
        scale_stride,
        HEADS=num_heads,
        DIM=dim,
        PADDED=_padded(dim),
        IS_INT8=isinstance(vectors, Int8Vectors),
        num_warps=1,
        enable_fp_fusion=False,  # the definition of INT8 rounds after each operation
    )


def _scales(vectors: CachedVectors) -> tuple[Tensor, int]:
    """Return a layer's scales and their stride; of exact vectors something that is not read."""
    if isinstance(vectors, Int8Vectors):
        return vectors.scales, vectors.scales.stride(0)
    return vectors.tokens, 0


def _padded(dim: int) -> int:
    """Return the size of a tile that holds `dim` elements."""
    size: int = triton.next_power_of_2(dim)
    return max(16, size)
