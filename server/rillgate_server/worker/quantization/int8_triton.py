"""W8A8 on NVIDIA GPUs: what `int8.linear_int8` defines, in two Triton kernels.

One quantises each row by its own scale, the other multiplies on the int8 matrix units and applies
scales and bias in its epilogue. Integer sums are exact, so the tile sizes, which follow the number
of rows, change no bit. (torch's `_int_mm` takes no fewer than 17 rows on CUDA, and leaves the
scaling to further passes over the sums.)

Imported only where there is a GPU, or Triton's interpreter (TRITON_INTERPRET=1, in tests): builds
of torch for CPUs come without Triton.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rillgate_server.worker.quantization.int8 import Int8Linear

_ROUNDS_EVEN = tl.constexpr(12582912.0)
"""1.5 * 2^23: added and taken away it rounds a small float32 half to even."""
_MAX_GRID_ROWS = 65535
"""Of a launch grid's second dimension."""


@dataclass(frozen=True, slots=True)
class _Tile:
    """How the product is cut."""

    rows: int
    channels: int
    inputs: int
    num_warps: int
    num_stages: int


_TILES = (
    (16, None, _Tile(16, 32, 512, 4, 5)),
    (32, None, _Tile(32, 32, 512, 4, 3)),
    (256, 16384, _Tile(64, 64, 128, 4, 5)),
    (256, None, _Tile(128, 64, 128, 4, 4)),
    (None, None, _Tile(256, 128, 128, 8, 3)),
)
"""(most rows, most channels, tile), measured on an H200 in Qwen2.5-7B's shapes. Few rows read each
weight once, and need many programs that read at once."""


def _tile_for(num_rows: int, num_channels: int) -> _Tile:
    """Choose by the product's size."""
    return next(
        tile
        for most_rows, most_channels, tile in _TILES
        if (most_rows is None or num_rows <= most_rows)
        and (most_channels is None or num_channels <= most_channels)
    )


@triton.jit
def _quantize_row(x, whole, scales, size: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Quantise one row of x [num_rows, size] into int8, with its scale."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    exact = tl.load(x + row * size + at, mask=at < size, other=0.0).to(tl.float32)
    size_of = tl.abs(exact)
    most = tl.max(size_of, axis=0)
    # A NaN may not come through the maximum.
    is_broken = tl.sum((size_of < float("inf")).to(tl.int32), axis=0) < BLOCK
    inverse = tl.div_rn(127.0, tl.where(most > 0.0, most, 1.0))  # a row of zeros stays zeros
    inverse = tl.where(is_broken | (inverse == float("inf")), 0.0, inverse)
    scaled = tl.where(size_of < float("inf"), exact, 0.0) * inverse
    rounded = (scaled + _ROUNDS_EVEN) - _ROUNDS_EVEN
    tl.store(whole + row * size + at, rounded.to(tl.int8), mask=at < size)
    scale = tl.where(is_broken, float("nan"), tl.div_rn(most, 127.0))
    tl.store(scales + row, scale)


@triton.jit(do_not_specialize=["num_rows"])  # a new number of rows compiles nothing
def _product(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a launch has no structs
    x,
    x_scales,
    weight,
    weight_scales,
    bias,
    y,
    num_rows,
    num_channels,
    num_inputs: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """Compute a tile [ROWS, CHANNELS] of y."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_row, is_channel = row < num_rows, channel < num_channels
    row64, channel64 = row.to(tl.int64), channel.to(tl.int64)
    sums = tl.zeros((ROWS, CHANNELS), dtype=tl.int32)
    for first in range(0, num_inputs, INPUTS):
        at = first + tl.arange(0, INPUTS)
        is_input = at < num_inputs
        rows = tl.load(
            x + row64[:, None] * num_inputs + at[None, :],
            mask=is_row[:, None] & is_input[None, :],
            other=0,
        )
        channels = tl.load(
            weight + channel64[:, None] * num_inputs + at[None, :],
            mask=is_channel[:, None] & is_input[None, :],
            other=0,
        )
        sums += tl.dot(rows, tl.trans(channels), out_dtype=tl.int32)
    row_scale = tl.load(x_scales + row, mask=is_row, other=0.0)
    channel_scale = tl.load(weight_scales + channel, mask=is_channel, other=0.0)
    exact = sums.to(tl.float32) * row_scale[:, None] * channel_scale[None, :]
    if HAS_BIAS:
        exact += tl.load(bias + channel, mask=is_channel, other=0.0)[None, :]
    tl.store(
        y + row64[:, None] * num_channels + channel[None, :],
        exact.to(y.dtype.element_ty),
        mask=is_row[:, None] & is_channel[None, :],
    )


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return [num_rows, size], int8, and [num_rows], float32, of x [num_rows, size]."""
    num_rows, size = x.shape
    whole = torch.empty_like(x, dtype=torch.int8)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        # Unfused: a product and the addition that rounds it are two roundings in the definition.
        block = triton.next_power_of_2(size)
        _quantize_row[(num_rows,)](x, whole, scales, size, BLOCK=block, enable_fp_fusion=False)
    return whole, scales


def linear_int8_triton(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b, bit for bit as int8.linear_int8. x: [num_rows, in_features]."""
    num_rows, num_inputs = x.shape
    num_channels = len(weight)
    y = torch.empty(num_rows, num_channels, dtype=x.dtype, device=x.device)
    tile = _tile_for(num_rows, num_channels)
    at_once = _MAX_GRID_ROWS * tile.rows
    for first in range(0, num_rows, at_once):
        whole, row_scales = quantize_rows(x[first : first + at_once].contiguous())
        grid = triton.cdiv(num_channels, tile.channels), triton.cdiv(len(whole), tile.rows)
        _product[grid](
            whole,
            row_scales,
            weight,
            scales,
            scales if bias is None else bias,
            y[first:],
            len(whole),
            num_channels,
            num_inputs,
            HAS_BIAS=bias is not None,
            ROWS=tile.rows,
            CHANNELS=tile.channels,
            INPUTS=tile.inputs,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=False,  # the definition rounds before it adds the bias
        )
    return y


class TritonInt8Linear(Int8Linear):
    """An Int8Linear on a GPU. State: none."""

    def __init__(
        self, weight: Tensor, scales: Tensor | None = None, channels: Tensor | None = None
    ) -> None:
        """Quantise `weight`, or, with its `scales`, take what is quantised, as Int8Linear does."""
        super().__init__(weight, None, scales, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b. x: [..., in_features]; the result in x's type."""
        y = linear_int8_triton(x.flatten(0, -2), self.weight, self.scales, self.bias)
        return y.view(*x.shape[:-1], -1)
