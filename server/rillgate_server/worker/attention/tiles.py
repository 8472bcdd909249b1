"""How a step's attention is cut into pieces for a GPU; plain arrays, worked out on the CPU.

Owns the cutting. Does not know tensors on devices, kernels or the cache.

    a row's queries   | tile | tile | til|                a decode row is one tile of one query
    a tile's keys     | split   | split   | spl|          at multiples of the row's split length
    an item           one tile x one split; done by one program per head of keys

A tile that is one item gives its result at once. The items of any other leave parts behind, which
a second kernel joins: that is what keeps all of a GPU busy with one long context (Flash-Decoding,
Dao et al., 2023). How a row is cut hangs on the row alone, never on its neighbours.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

KEYS_PER_STEP = 64
"""That a program reads at a time; splits begin at multiples of it."""
MAX_PARTS = 32
"""Of one tile."""
MIN_DECODE_SPLIT = 256
"""Tokens; below it the joining costs what the splitting saves."""
_MIN_CHUNK_SPLIT = 1024
_BUSY_PROGRAMS = 128
"""About as many as a large GPU has multiprocessors: a row that gives as many is not split."""
NUM_ITEM_FIELDS = 7
NUM_JOIN_FIELDS = 4


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one kind (decode rows, or chunks), a number for each."""

    offset: Ints
    """Of the first token in the packed step."""
    start: Ints
    """Position of the first token."""
    num_tokens: Ints
    table_at: Ints
    """Where in the step's block tables its own begins."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What programs do."""

    items: Ints
    """[7, num_items]: first token, number of tokens, first position, table_at, first key, end of
    keys, part to leave behind (-1: the result itself). The longest first."""
    joins: Ints
    """[4, num_joins]: first token, number of tokens, first part, number of parts."""
    num_parts: int


def cut(
    rows: Rows, queries_per_tile: int, num_kv_heads: int, window: int | None, *, is_decode: bool
) -> Cut:
    """Cut rows into items. `window`: tokens that a query sees, itself included; None: all."""
    tiles_of = -(-rows.num_tokens // queries_per_tile)
    row = np.repeat(np.arange(len(tiles_of)), tiles_of)
    done = (np.arange(len(row)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)) * (
        queries_per_tile
    )
    token, start = rows.offset[row] + done, rows.start[row] + done
    num_tokens = np.minimum(rows.num_tokens[row] - done, queries_per_tile)
    end = start + num_tokens
    first = np.zeros_like(end)
    if window is not None:
        first = np.maximum(start - window + 1, 0) // KEYS_PER_STEP * KEYS_PER_STEP

    split = _split_tokens(rows, tiles_of * num_kv_heads, is_decode=is_decode)[row]
    first_split = first // split
    num_splits = (end - 1) // split - first_split + 1
    num_parts = np.where(num_splits > 1, num_splits, 0)
    first_part = np.cumsum(num_parts) - num_parts

    tile = np.repeat(np.arange(len(row)), num_splits)
    nth = np.arange(len(tile)) - np.repeat(np.cumsum(num_splits) - num_splits, num_splits)
    begin = (first_split[tile] + nth) * split[tile]
    keys = np.maximum(begin, first[tile]), np.minimum(begin + split[tile], end[tile])
    part = np.where(num_splits[tile] > 1, first_part[tile] + nth, -1)
    own = token[tile], num_tokens[tile], start[tile], rows.table_at[row][tile]
    items = np.stack([*own, *keys, part])
    if not is_decode:
        items = items[:, np.argsort(keys[0] - keys[1], kind="stable")]
    parted = np.flatnonzero(num_parts)
    joins = np.stack([it[parted] for it in (token, num_tokens, first_part, num_parts)])
    return Cut(items, joins, int(num_parts.sum()))


def _split_tokens(rows: Rows, num_programs: Ints, *, is_decode: bool) -> Ints:
    """Return each row's split length: so that all its splits together keep a GPU busy."""
    most = np.clip(_BUSY_PROGRAMS // np.maximum(num_programs, 1), 1, MAX_PARTS)
    length = -(-(rows.start + rows.num_tokens) // most)
    length = -(-length // KEYS_PER_STEP) * KEYS_PER_STEP
    least = MIN_DECODE_SPLIT if is_decode else _MIN_CHUNK_SPLIT
    split: Ints = np.maximum(length, least)
    return split
