"""Attention over gathered blocks with torch's own kernels; made for CPUs, the same on GPUs.

Owns how a step's rows are grouped and gathered, and attention of decode rows (attention.chunk has
that of chunks). Does not know the model around it.

A decode row (one token) reads its whole context for one query, so the cost is the gather: rows of
similar length share one gather and one call, in which a group's heads are the "query tokens", so
that grouped heads never repeat keys or values in memory. A chunk row has work enough for calls of
its own, and when it begins its sequence it needs no gather at all, unless the cache is in INT8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rillgate_server.core.model_spec import INT8
from rillgate_server.worker.attention.base import AttentionStep, PackedRow, PackedStep
from rillgate_server.worker.attention.chunk import DistanceMasks, attend_chunk, widened
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.layer_cache import LayerCache

_MAX_WASTED_TOKENS = 1024
"""Padding that one group of decode rows may carry. At two heads of 64 it costs what another call
per layer costs, some 0.1 ms (measured)."""
_MAX_GROUP_TOKENS = 16384
"""Context that one group of decode rows gathers; at two heads of 64 that is 16 MB in float32."""


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Decode rows that are gathered and computed together."""

    offsets: Tensor | None
    """[num_rows], int64: their tokens in the step; None = all tokens of the step, in order."""
    blocks: Tensor
    """[num_rows * num_blocks], int64: what to gather."""
    mask: Tensor
    """[num_rows, 1, 1, num_blocks * block_size], float32: 0 or -inf."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One row of several tokens."""

    row: PackedRow
    first: int
    """Position of the first key that is gathered."""
    blocks: Tensor | None
    """[num_blocks], int64; None = the sequence begins here: the new keys are all there is, and the
    cache keeps them as they are."""


@dataclass(frozen=True, slots=True)
class _WindowPlan:
    """What all layers of one window share."""

    window: int | None
    masks: DistanceMasks
    decode_groups: tuple[_DecodeGroup, ...]
    chunks: tuple[_Chunk, ...]


class SdpaAttention:
    """The backend: holds the storage, makes a step's attention.

    State: masks, which grow with the longest context so far.
    """

    def __init__(self, storage: KVStorage, dtype: torch.dtype) -> None:
        """Attend over `storage` for a model of `dtype`."""
        self._storage = storage
        windows = {layer.window_tokens for layer in storage.layout.layers}
        self._device = storage.bytes.device
        self._masks = {window: DistanceMasks(window, dtype, self._device) for window in windows}

    def prepare(self, step: PackedStep) -> AttentionStep:
        """Plan the gathers and masks of each distinct window."""
        layers = self._storage.layout.layers
        plans = {window: self._plan_window(step, window) for window in self._masks}
        per_layer = tuple(plans[layer.window_tokens] for layer in layers)
        return _SdpaStep(self._storage.layers, per_layer, step.slot_mapping)

    def _plan_window(self, step: PackedStep, window: int | None) -> _WindowPlan:
        decode_rows = [row for row in step.rows if row.num_tokens == 1]
        block_size = self._storage.layout.block_size_tokens
        all_decode = len(decode_rows) == len(step.rows)
        groups = _group_by_length(decode_rows, block_size, window)
        return _WindowPlan(
            window,
            self._masks[window],
            tuple(
                self._plan_decode(rows, window, in_order=all_decode and len(groups) == 1)
                for rows in groups
            ),
            tuple(self._plan_chunk(row, window) for row in step.rows if row.num_tokens > 1),
        )

    def _plan_decode(
        self, rows: Sequence[PackedRow], window: int | None, *, in_order: bool
    ) -> _DecodeGroup:
        block_size = self._storage.layout.block_size_tokens
        spans = [_block_span(row, block_size, window) for row in rows]
        num_blocks = max(last - first for first, last in spans)
        # A gather may not run past a table's end: begin earlier instead, the mask hides it.
        firsts = [
            min(first, len(row.block_table) - num_blocks)
            for row, (first, _) in zip(rows, spans, strict=True)
        ]
        blocks = torch.stack(
            [
                row.block_table[first : first + num_blocks]
                for row, first in zip(rows, firsts, strict=True)
            ]
        )
        own = torch.tensor([row.start for row in rows])[:, None]
        begin = torch.tensor(firsts)[:, None] * block_size
        seen = begin + torch.arange(num_blocks * block_size)
        mask = _mask(own, seen, window)[:, None, None]
        offsets = None
        if not in_order:
            offsets = torch.tensor([row.offset for row in rows]).to(self._device)
        return _DecodeGroup(offsets, blocks.flatten().to(self._device), mask.to(self._device))

    def _plan_chunk(self, row: PackedRow, window: int | None) -> _Chunk:
        # In INT8 new keys and values are not quite what the cache keeps of them: read that, or
        # where chunks begin would change the tokens.
        if row.start == 0 and self._storage.layout.kv_dtype != INT8:
            return _Chunk(row, 0, None)
        block_size = self._storage.layout.block_size_tokens
        first, last = _block_span(row, block_size, window)
        return _Chunk(row, first * block_size, row.block_table[first:last].to(self._device))


class _SdpaStep:
    """One step's attention (AttentionStep)."""

    def __init__(
        self,
        caches: tuple[LayerCache, ...],
        plans: tuple[_WindowPlan, ...],
        slot_mapping: tuple[Tensor, Tensor],
    ) -> None:
        self._caches = caches
        self._plans = plans
        self._slot_mapping = slot_mapping

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Store, then attend row by row (AttentionStep.attend)."""
        cache, plan = self._caches[layer_index], self._plans[layer_index]
        cache.write(self._slot_mapping, key.transpose(0, 1), value.transpose(0, 1))
        num_heads, num_tokens, _ = query.shape
        if not plan.chunks and len(plan.decode_groups) == 1:
            return _decode(cache, plan.decode_groups[0], query, scaling)
        output = query.new_empty(num_tokens, num_heads, value.shape[-1])
        for group in plan.decode_groups:
            output[group.offsets] = _decode(cache, group, query, scaling)
        for chunk in plan.chunks:
            offset, end = chunk.row.offset, chunk.row.offset + chunk.row.num_tokens
            keys, values = key[:, offset:end], value[:, offset:end]
            if chunk.blocks is not None:
                keys, values = _gather_chunk(cache, chunk, chunk.blocks, query.dtype)
            output[offset:end] = attend_chunk(
                query[:, offset:end],
                keys,
                values,
                window=plan.window,
                masks=plan.masks,
                scaling=scaling,
            )
        return output


def _decode(cache: LayerCache, group: _DecodeGroup, query: Tensor, scaling: float) -> Tensor:
    """Attend for decode rows. Returns [num_rows, num_heads, value_dim].

    In float32, converted after the gather: torch's bf16 attention makes a library call per row and
    head, which costs more than the conversion (615 against 570 us at 32 rows of 208 tokens, 2
    heads of 64; 1057 against 279 at 4 heads of 32).
    """
    num_rows = group.mask.shape[0]
    num_kv_heads, dim = cache.keys.shape_per_token
    if group.offsets is not None:
        query = query.index_select(1, group.offsets)
    num_heads = query.shape[0]
    query = query.transpose(0, 1).reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, dim)
    keys = cache.keys.gather(group.blocks, torch.float32).unflatten(0, (num_rows, -1))
    values = cache.values.gather(group.blocks, torch.float32).unflatten(0, (num_rows, -1))
    value_dim = values.shape[-1]
    output = F.scaled_dot_product_attention(
        query.float(),
        keys.transpose(1, 2),
        widened(values, dim).transpose(1, 2),
        attn_mask=group.mask,
        scale=scaling,
    )
    return output[..., :value_dim].reshape(num_rows, num_heads, value_dim).to(query.dtype)


def _gather_chunk(
    cache: LayerCache, chunk: _Chunk, blocks: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return keys and values [num_kv_heads, context, dim] of a chunk row, up to its end."""
    context = chunk.row.start + chunk.row.num_tokens - chunk.first
    keys = cache.keys.gather(blocks, dtype)[:context]
    values = cache.values.gather(blocks, dtype)[:context]
    return keys.transpose(0, 1), values.transpose(0, 1)


def _mask(own: Tensor, seen: Tensor, window: int | None) -> Tensor:
    """Return 0 where the position `own` attends to the position `seen`, else -inf. float32."""
    hidden = seen > own
    if window is not None:
        hidden |= seen <= own - window
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _block_span(row: PackedRow, block_size: int, window: int | None) -> tuple[int, int]:
    """Return the block-table range [first, last) that a row's tokens attend to."""
    first = 0 if window is None else max(0, row.start - window + 1) // block_size
    return first, -(-(row.start + row.num_tokens) // block_size)


def _group_by_length(
    rows: Sequence[PackedRow], block_size: int, window: int | None
) -> list[list[PackedRow]]:
    """Split decode rows into groups of similar context, none with much padding."""

    def num_blocks(row: PackedRow) -> int:
        first, last = _block_span(row, block_size, window)
        return last - first

    groups: list[list[PackedRow]] = []
    longest = wasted = 0
    ordered = sorted(rows, key=num_blocks, reverse=True)
    for row in ordered:
        padding = (longest - num_blocks(row)) * block_size
        is_full = bool(groups) and (len(groups[-1]) + 1) * longest * block_size > _MAX_GROUP_TOKENS
        if not groups or is_full or wasted + padding > _MAX_WASTED_TOKENS:
            groups.append([row])
            longest, wasted = num_blocks(row), 0
        else:
            groups[-1].append(row)
            wasted += padding
    if len(groups) == 1:
        return [list(rows)]  # in the step's order: no gather of queries, no scatter of outputs
    return groups
