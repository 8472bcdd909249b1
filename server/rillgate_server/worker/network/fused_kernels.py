"""What lies between a layer's products on NVIDIA GPUs, and is not attention's: Triton kernels.

    add_norm    residual += delta; its RMS norm
    silu_mul    silu(gate) * up, of a joined product

They compute in float32, each row by itself, so that neither the batch nor its padding changes a bit
of a row. `add_norm` rounds where transformers' modules do; `silu_mul` rounds once, at its end.
(rotary_kernel has what comes before attention.)

No launch waits for the device, and none of the shapes hangs on what is in a tensor: a CUDA graph
can hold them. Imported only where there is a GPU, or Triton's interpreter. Does not know models.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_SILU_BLOCK = 1024
"""Of a row: each of 128 threads loads 16 bytes of bf16 gates and of their ups. One token of a 7B
model is spread over 19 programs, and thousands have enough bytes in flight at any size."""


@triton.jit
def _add_norm(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - a launch has no structs
    residual,
    delta,
    weight,
    normed,
    epsilon,
    size: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add to one row and norm it."""
    row = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    is_inside = at < size
    kept = residual.dtype.element_ty
    x = tl.load(residual + row + at, mask=is_inside, other=0.0)
    if HAS_DELTA:
        added = tl.load(delta + row + at, mask=is_inside, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(kept)
        tl.store(residual + row + at, x, mask=is_inside)
    exact = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(exact * exact, axis=0) / size + epsilon)
    rounded = (exact * inverse).to(kept).to(tl.float32)
    scale = tl.load(weight + at, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(normed + row + at, (scale * rounded).to(kept), mask=is_inside)


def add_norm(residual: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """Add `delta` to `residual` in place, and return its RMS norm times `weight`.

    residual, delta: [num_tokens, size], contiguous, model dtype; weight: [size].
    """
    num_tokens, size = residual.shape
    normed = torch.empty_like(residual)
    if num_tokens:
        block = triton.next_power_of_2(size)
        _add_norm[(num_tokens,)](
            residual,
            residual if delta is None else delta,
            weight,
            normed,
            epsilon,
            size,
            HAS_DELTA=delta is not None,
            BLOCK=block,
            # A row is waited for, not streamed: 16 elements of a thread are two loads of 16 bytes.
            num_warps=min(16, max(4, block // 512)),
        )
    return normed


@triton.jit
def _silu_mul(gate_up, y, size: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute a run of one row."""
    runs: tl.constexpr = (size + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // runs).to(tl.int64)
    at = (program % runs) * BLOCK + tl.arange(0, BLOCK)
    is_inside = at < size
    gate = tl.load(gate_up + row * (2 * size) + at, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * size) + size + at, mask=is_inside, other=0.0)
    product = gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)
    tl.store(y + row * size + at, product.to(y.dtype.element_ty), mask=is_inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up. gate_up: [num_tokens, 2 * size], contiguous, gates first."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(num_tokens, size)
    if num_tokens:
        grid = (num_tokens * triton.cdiv(size, _SILU_BLOCK),)
        _silu_mul[grid](gate_up, y, size, BLOCK=_SILU_BLOCK, num_warps=4)
    return y
