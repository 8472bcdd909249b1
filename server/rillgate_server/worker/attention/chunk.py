"""Attention of one row of several tokens (a chunk of a prompt) over its own context.

Owns the tiling of a chunk's queries and the masks. Does not know blocks or the cache: keys and
values come as they lie behind one another.

A tile of queries attends to what its last query may see, and no further; so half of a prompt's
square is never computed. Whether a position is seen hangs on its distance alone, so one mask,
aligned at its lower right corner, serves every tile of every step:

                      context, oldest first            tile
    mask[-m:, -c:]    0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 | 0 - -      m rows (queries) of the tile
                      - 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 | 0 0 -      c columns (context)
                      - - 0 0 0 0 0 0 0 0 0 0 0 0 0 0 | 0 0 0
                      ^ behind the window
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE_TOKENS = 128
"""Most queries per tile: 64 to 256 measure alike."""
_MIN_TILE_TOKENS = 16
_MAX_SCORES = 1 << 19
"""Scores that a mixed tile holds: 2 MB, the second-level cache. At twice that a tile was seen to
take three times as long per query (page faults of buffers that come and go)."""
_GROWTH_TOKENS = 4096
"""Masks grow by so many columns: 1 MB in bf16, made in some milliseconds."""
_MAX_MIXED_CONTEXT = 4096
"""Longest context for which `_attend_mixed` is used; it was measured no further. 512 queries, 14
heads of 64 in 2 groups, in ms of one core, torch's own attention and this: 11.2 and 7.1 at 512,
24.1 and 17.7 at 1024, 102 and 74 at 4096. 32 heads of 128 in 8 groups, 512 of 512: 50 and 21."""


class DistanceMasks:
    """Masks of one window, as corners of one that grows. State: `_mask`."""

    def __init__(self, window: int | None, dtype: torch.dtype, device: torch.device) -> None:
        """Hide the future, and what is `window` or more tokens back; 0 or -inf in `dtype`."""
        self._window = window
        self._mask = torch.empty(_TILE_TOKENS, 0, dtype=dtype, device=device)

    def corner(self, num_queries: int, num_keys: int) -> Tensor:
        """Return the mask for queries at the end of keys. [num_queries, num_keys], a view."""
        if num_keys > self._mask.shape[1]:
            self._grow(-(-num_keys // _GROWTH_TOKENS) * _GROWTH_TOKENS)
        return self._mask[-num_queries:, self._mask.shape[1] - num_keys :]

    def _grow(self, num_keys: int) -> None:
        query = torch.arange(num_keys - _TILE_TOKENS, num_keys)[:, None]
        hidden = torch.arange(num_keys) > query
        if self._window is not None:
            hidden |= torch.arange(num_keys) <= query - self._window
        zeros = torch.zeros(hidden.shape, dtype=self._mask.dtype)
        self._mask = zeros.masked_fill_(hidden, -torch.inf).to(self._mask.device)


def attend_chunk(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    window: int | None,
    masks: DistanceMasks,
    scaling: float,
) -> Tensor:
    """Attend for one row's tokens.

    query: [num_heads, num_tokens, key_dim]; keys, values: [num_kv_heads, context, dim], whose last
    position is the last query's own. Returns [num_tokens, num_heads, value_dim].
    """
    num_heads, num_tokens, _ = query.shape
    num_kv_heads, context, _ = keys.shape
    output = query.new_empty(num_tokens, num_heads, values.shape[-1])
    is_mixed = query.dtype == torch.bfloat16 and context <= _MAX_MIXED_CONTEXT and query.is_cpu
    if is_mixed:
        keys = keys.float()
    else:
        values = widened(values, keys.shape[-1])
    grouped = query.unflatten(0, (num_kv_heads, num_heads // num_kv_heads))
    tile_tokens = _TILE_TOKENS
    if is_mixed:
        fitting = _MAX_SCORES // (num_heads * context) // 16 * 16
        tile_tokens = min(max(fitting, _MIN_TILE_TOKENS), _TILE_TOKENS)
    for first in range(0, num_tokens, tile_tokens):
        last = min(first + tile_tokens, num_tokens)
        end = context - num_tokens + last
        begin = 0 if window is None else max(0, end - (last - first) - window + 1)
        mask = masks.corner(last - first, end - begin)
        attend = _attend_mixed if is_mixed else _attend
        tile = attend(
            grouped[:, :, first:last], keys[:, begin:end], values[:, begin:end], mask, scaling
        )
        tile = tile.reshape(num_heads, last - first, -1).transpose(0, 1)
        output[first:last] = tile[..., : output.shape[-1]]
    return output


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Call torch's attention; the kv heads are its batch, so that groups share keys unrepeated.

    query: [num_kv_heads, group, num_queries, key_dim]. Returns the same with value_dim.
    """
    shape = (-1, query.shape[1], -1, -1)
    if not mask.is_cpu:
        mask = mask.clone(memory_format=torch.contiguous_format)  # its kernels want it aligned
    return F.scaled_dot_product_attention(
        query,
        keys[:, None].expand(shape),
        values[:, None].expand(shape),
        attn_mask=mask,
        scale=scaling,
    )


def _attend_mixed(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float
) -> Tensor:
    """Take scores and softmax in float32, and the sum over values in bf16, which is eight times
    as fast. torch's attention takes both at float32's speed; scores in bf16 would be too coarse
    (Qwen2's reach hundreds).

    Like `_attend`, but keys are float32. Returns [num_kv_heads, group * num_queries, value_dim].
    """
    num_kv_heads, group, num_queries, dim = query.shape
    rows = query.float().mul_(scaling).reshape(num_kv_heads, group * num_queries, dim)
    scores = torch.matmul(rows, keys.transpose(1, 2))
    scores.view(num_kv_heads, group, num_queries, -1).add_(mask)
    return torch.matmul(torch.softmax(scores, dim=-1).to(values.dtype), values)


def widened(values: Tensor, key_dim: int) -> Tensor:
    """Give values narrower than keys (DeepSeek-V3) columns of zeros.

    torch's fast path wants equal widths; its plain path would hold a [tokens, context] matrix per
    head.
    """
    missing = key_dim - values.shape[-1]
    return F.pad(values, (0, missing)) if missing > 0 else values
