"""The C++ kernels give what their definition in torch gives, row by row, in any batch."""

import platform
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rillgate_server.worker.kernels.library import Kernels, Linear, load_kernels
from rillgate_server.worker.quantization.int8 import linear_int8, quantize_weight

SHAPES = [(64, 64), (128, 896), (100, 37), (17, 4864), (896, 4864), (5, 3), (1, 1)]
"""(out_features, in_features): whole panels and what does not fill one."""
NUM_ROWS = [1, 2, 3, 5, 6, 7, 13, 40]


@pytest.fixture
def kernels() -> Kernels:
    """The library, where it was built and the processor can run it."""
    found = load_kernels()
    if found is None:
        pytest.skip("no C++ kernels here: not built, or no AVX-512 VNNI and BF16")
    return found


def test_they_are_there_where_they_can_be() -> None:
    """Or every test of theirs would be skipped, and nobody would know why servers are slow."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    if platform.machine() != "x86_64" or not {"avx512_vnni", "avx512_bf16"} <= set(flags.split()):
        pytest.skip("this processor lacks AVX-512 VNNI or BF16")
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    assert load_kernels() is not None, "run `make setup`"


def rows(num_rows: int, in_features: int, dtype: torch.dtype) -> Tensor:
    """Draw activations of very different sizes, the third row zeros."""
    x = torch.randn(num_rows, in_features) * torch.logspace(-3, 3, num_rows)[:, None]
    x[2:3] = 0.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_bit_for_bit_as_defined(
    shape: tuple[int, int], dtype: torch.dtype, kernels: Kernels
) -> None:
    """With a bias and without, for few rows and many."""
    torch.manual_seed(0)
    weight, scales = quantize_weight(torch.randn(shape))
    packed = kernels.pack_int8(weight)
    for bias in (None, torch.randn(shape[0])):
        for num_rows in NUM_ROWS:
            x = rows(num_rows, shape[1], dtype)
            got = kernels.linear(Linear.of(packed, scales, bias, shape), x)
            assert torch.equal(got, linear_int8(x, weight, scales, bias)), (bias, num_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_not_finite_spoils_no_other(dtype: torch.dtype, kernels: Kernels) -> None:
    """NaN and infinity give NaN, in the kernel as in the definition."""
    weight, scales = quantize_weight(torch.randn(70, 64))
    packed = kernels.pack_int8(weight)
    x = rows(4, 64, dtype)
    x[1, 3], x[3, 60] = torch.nan, -torch.inf
    for y in (
        kernels.linear(Linear.of(packed, scales, None, (70, 64)), x),
        linear_int8(x, weight, scales, None),
    ):
        assert torch.isfinite(y[[0, 2]]).all()
        assert torch.isnan(y[[1, 3]]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_near_the_exact_product_and_the_same_in_any_batch(
    shape: tuple[int, int], kernels: Kernels
) -> None:
    """Within the rounding of the result and of a sum in float32."""
    torch.manual_seed(0)
    weight = torch.randn(shape).bfloat16()
    packed = kernels.pack_bf16(weight)
    for bias in (None, torch.randn(shape[0])):
        for num_rows in NUM_ROWS:
            x = rows(num_rows, shape[1], torch.bfloat16)
            layer = Linear.of(packed, None, bias, shape)
            got = kernels.linear(layer, x)
            exact = x.double() @ weight.double().T + (0.0 if bias is None else bias)
            sizes = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)
            assert ((got - exact).abs() <= exact.abs() * 2**-8 + sizes * 1e-5).all()
            for i in range(num_rows):
                alone = kernels.linear(layer, x[i : i + 1])
                assert torch.equal(alone[0], got[i])


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_share_the_channels(num_threads: int, kernels: Kernels) -> None:
    """Whatever their number, and where there are fewer panels than threads."""
    weight, scales = quantize_weight(torch.randn(130, 64))
    x = rows(3, 64, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        packed = kernels.pack_int8(weight)
        got = kernels.linear(Linear.of(packed, scales, None, (130, 64)), x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got, linear_int8(x, weight, scales, None))
