"""The C++ kernels give what their definition in torch gives, row by row, in any batch."""

import platform
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rillgate_server.errors import ConfigError
from rillgate_server.worker.kernels.build import LEVELS
from rillgate_server.worker.kernels.library import Kernels, Linear, load_kernels
from rillgate_server.worker.quantization.int8 import linear_int8, quantize_weight

SHAPES = [(64, 64), (128, 896), (100, 37), (17, 4864), (896, 4864), (5, 3), (1, 1)]
"""(out_features, in_features): whole panels and what does not fill one."""
NUM_ROWS = [1, 2, 3, 5, 6, 7, 13, 40]


@pytest.fixture(params=list(LEVELS))
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Each level's library, where it was built and the processor can run it."""
    found = load_kernels(request.param)
    if found is None:
        pytest.skip(f"no C++ kernels for {request.param} here: not built, or not this processor's")
    return found


def test_they_are_there_where_they_can_be() -> None:
    """Or every test of theirs would be skipped, and nobody would know why servers are slow."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    if platform.machine() != "x86_64" or not {"avx2", "fma"} <= set(flags.split()):
        pytest.skip("this processor lacks AVX2")
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    assert load_kernels("avx2") is not None, "run `make setup`"
    has_avx512 = {"avx512_vnni", "avx512_bf16", "avx512dq", "avx512vl"} <= set(flags.split())
    assert not has_avx512 or load_kernels("avx512") is not None, "run `make setup`"


def test_the_environment_names_the_level_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it names wrongly is refused with what is allowed."""
    choose = load_kernels.__wrapped__
    monkeypatch.setenv("RILLGATE_KERNELS", "off")
    assert choose() is None
    monkeypatch.setenv("RILLGATE_KERNELS", "avx2")
    found = choose()
    assert found is None or not found.has_attention
    monkeypatch.setenv("RILLGATE_KERNELS", "sse9")
    with pytest.raises(ConfigError, match=r"RILLGATE_KERNELS is 'sse9'; allowed: avx512, .*, off"):
        choose()


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


def test_int8_holds_the_largest_numbers(kernels: Kernels) -> None:
    """All weights and activations at their ends, -128 too: no level's sums overflow on the way."""
    ends = torch.tensor([-128, -127, 127], dtype=torch.int8)
    weight = ends[torch.arange(3)][:, None].repeat(1, 256)
    scales = torch.ones(3)
    packed = kernels.pack_int8(weight)
    x = torch.cat([torch.full((1, 256), 127.0), torch.full((1, 256), -127.0)])
    got = kernels.linear(Linear.of(packed, scales, None, (3, 256)), x)
    assert torch.equal(got, x @ weight.T.float())


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
