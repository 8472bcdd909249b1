"""The kernels between a layer's products, here in Triton's interpreter, against plain torch."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from rillgate_server.worker.network.fused_kernels import add_norm, silu_mul
from tests.support.gpu_compile import compile_launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDINGS = {torch.float32: 1e-6, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
"""What may differ, relatively: sums in another order, and the interpreter cuts bf16 where hardware
rounds."""
SIZES = ((1, 64), (5, 72), (1, 1000), (37, 24))
EPSILON = 1e-5


@pytest.mark.parametrize("dtype", list(ROUNDINGS))
@pytest.mark.parametrize(("num_tokens", "size"), SIZES)
def test_rows_are_added_and_normed_as_transformers_does(
    num_tokens: int, size: int, dtype: torch.dtype
) -> None:
    """The sum is kept, rounded; its norm is rounded before it is multiplied by the weight."""
    torch.manual_seed(size)
    residual, delta, weight = (
        (torch.randn(shape) * 3).to(dtype)
        for shape in ((num_tokens, size), (num_tokens, size), (size,))
    )
    kept = residual.clone().to(DEVICE)
    normed = add_norm(kept, delta.to(DEVICE), weight.to(DEVICE), EPSILON)
    near = partial(torch.testing.assert_close, rtol=ROUNDINGS[dtype], atol=ROUNDINGS[dtype])
    near(kept.cpu(), residual + delta)
    # From the sum as it was kept: an error of a cut sum is not one of its norm.
    exact = kept.cpu().float()
    unit = (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + EPSILON)).to(dtype)
    near(normed.cpu(), weight * unit)


def test_a_first_norm_adds_nothing() -> None:
    """Without what is to be added the residual stream stays as it is."""
    residual, weight = torch.randn(3, 40, device=DEVICE), torch.randn(40, device=DEVICE)
    before = residual.clone()
    normed = add_norm(residual, None, weight, EPSILON)
    assert torch.equal(residual, before)
    torch.testing.assert_close(normed, F.rms_norm(before, (40,), weight, EPSILON))


@pytest.mark.parametrize("dtype", list(ROUNDINGS))
@pytest.mark.parametrize(("num_tokens", "size"), [*SIZES, (2, 1025)])
def test_gates_are_multiplied_with_ups(num_tokens: int, size: int, dtype: torch.dtype) -> None:
    """Gates come first in a row; the product is rounded once."""
    torch.manual_seed(size)
    gate_up = (torch.randn(num_tokens, 2 * size) * 5).to(dtype)
    gate_up[0, :2] = torch.tensor([-60000.0, 60000.0])
    got = silu_mul(gate_up.to(DEVICE)).cpu()
    gate, up = gate_up.float().chunk(2, dim=-1)
    expected = (F.silu(gate) * up).to(dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=ROUNDINGS[dtype], atol=1e-6)


def test_no_rows_are_no_launch() -> None:
    """Nothing in, nothing out."""
    none = torch.empty(0, 8, device=DEVICE)
    assert add_norm(none, none, torch.ones(8, device=DEVICE), EPSILON).shape == (0, 8)
    assert silu_mul(none).shape == (0, 4)


def test_a_row_is_the_same_in_any_batch() -> None:
    """Bit for bit, and whatever its neighbours hold."""
    rows, weight = torch.randn(9, 72, device=DEVICE), torch.randn(72, device=DEVICE)
    rows[3] = torch.nan
    together = add_norm(rows.clone(), rows, weight, EPSILON), silu_mul(rows)
    own = rows[4:5].clone()
    alone = add_norm(own.clone(), own, weight, EPSILON), silu_mul(own)
    for got, expected in zip(together, alone, strict=True):
        assert torch.equal(got[4:5], expected)


def test_they_compile_for_a_gpu_without_spills() -> None:
    """In the shapes of 7B and 0.5B, in every type; few enough registers for full occupancy, or
    half of it where heads are quantised."""
    compiled = compile_launches("tests.support.fused_launches:launch_all")
    names = {"_add_norm": 40, "_silu_mul": 40, "_rotate_and_store": 64}
    assert {kernel.name for kernel in compiled} == set(names)
    assert len(compiled) >= 40
    for kernel in compiled:
        assert kernel.spilled_bytes == 0
        assert kernel.shared_bytes <= 4096  # what is left is L1
        assert kernel.num_registers <= names[kernel.name]
