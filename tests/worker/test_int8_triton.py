"""INT8 products on GPUs, here in Triton's interpreter: every bit of the definition's."""

import pytest
import torch

from rillgate_server.worker.quantization.int8 import linear_int8, quantize_weight
from rillgate_server.worker.quantization.int8_triton import TritonInt8Linear, linear_int8_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(num_rows: int, num_inputs: int, num_channels: int, dtype: torch.dtype) -> None:
    """Compare a product with the definition."""
    torch.manual_seed(num_rows)
    x = (torch.randn(num_rows, num_inputs) * torch.logspace(-3, 3, num_rows)[:, None]).to(dtype)
    whole, scales = quantize_weight(torch.randn(num_channels, num_inputs))
    for bias in (None, torch.randn(num_channels)):
        expected = linear_int8(x, whole, scales, bias)
        got = linear_int8_triton(
            x.to(DEVICE),
            whole.to(DEVICE),
            scales.to(DEVICE),
            None if bias is None else bias.to(DEVICE),
        )
        assert got.dtype == dtype
        # The interpreter cuts bf16 where hardware rounds.
        ulp = 0.0 if DEVICE == "cuda" or dtype == torch.float32 else 2.0**-7
        torch.testing.assert_close(got.cpu(), expected, rtol=ulp, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 5, 17, 70])
def test_a_product_has_the_bits_of_the_definition(num_rows: int, dtype: torch.dtype) -> None:
    """Whatever tile the number of rows chooses; with sizes that no tile divides."""
    check(num_rows, 296, 72, dtype)


def test_rows_that_are_zero_or_not_finite_give_what_the_definition_gives() -> None:
    """Zeros and the bias, or NaN; and leave their neighbours alone."""
    x = torch.randn(4, 64)
    x[0] = 0.0
    x[1, 3] = torch.nan
    x[2, 5] = -torch.inf
    whole, scales = quantize_weight(torch.randn(40, 64))
    bias = torch.randn(40)
    expected = linear_int8(x, whole, scales, bias)
    got = linear_int8_triton(*(it.to(DEVICE) for it in (x, whole, scales, bias)))
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert expected[1:3].isnan().all()


def test_a_layer_takes_any_shape_of_rows() -> None:
    """As transformers' modules call it."""
    layer = TritonInt8Linear(torch.randn(24, 32, device=DEVICE))
    x = torch.randn(2, 3, 32, device=DEVICE)
    assert torch.equal(layer(x)[1, 2], layer(x[1, 2][None])[0])


def test_a_cut_has_the_scales_of_whole_channels() -> None:
    """The channels may lie elsewhere, and in the files' type."""
    torch.manual_seed(0)
    channels = torch.randn(24, 64)
    whole, scales = quantize_weight(channels.bfloat16())
    layer = TritonInt8Linear(channels[:, 32:].bfloat16().to(DEVICE), None, channels)
    assert torch.equal(layer.weight.cpu(), whole[:, 32:])
    assert torch.equal(layer.scales.cpu(), scales)
