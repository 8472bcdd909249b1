"""A layer's views lie where the layout says, and INT8 keeps each vector within half a scale."""

import pytest
import torch
from torch import Tensor

from rillgate_server.core.model_spec import KVLayout
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.layer_cache import Int8Vectors, LayerCache, quantize

LAYERS = (((2, 24), (2, 16), None), ((2, 24), (2, 16), 8), ((1, 5), (1, 3), None))
BLOCK_SIZE = 4


def make_layers(kv_dtype: str, num_blocks: int = 3) -> tuple[LayerCache, ...]:
    """Reserve a small cache."""
    return KVStorage(KVLayout.build(BLOCK_SIZE, kv_dtype, LAYERS), num_blocks).layers


def views(layer: LayerCache) -> list[Tensor]:
    """List all tensors of a layer, one per segment."""
    found = []
    for vectors in (layer.keys, layer.values):
        found.append(vectors.tokens)
        if isinstance(vectors, Int8Vectors):
            found.append(vectors.scales)
    return found


@pytest.mark.parametrize(("kv_dtype", "num_views"), [("bfloat16", 6), ("int8", 12)])
def test_every_segment_keeps_what_was_written_to_it(kv_dtype: str, num_views: int) -> None:
    """Each layer's keys, values and scales hold a number of their own in every block."""
    found = [view for layer in make_layers(kv_dtype) for view in views(layer)]
    assert len(found) == num_views
    for i, view in enumerate(found):
        view.fill_(i + 1)
    for i, view in enumerate(found):
        assert (view == i + 1).all()


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_tokens_are_gathered_from_where_the_slot_mapping_put_them(kv_dtype: str) -> None:
    """Blocks come in the order asked for, and all but the written tokens are zeros."""
    layer = make_layers(kv_dtype)[0]
    keys, values = torch.randn(2, 2, 24).bfloat16(), torch.randn(2, 2, 16).bfloat16()
    layer.write((torch.tensor([2, 0]), torch.tensor([3, 1])), keys, values)
    for vectors, written in ((layer.keys, keys), (layer.values, values)):
        gathered = vectors.gather(torch.tensor([2, 1, 0]), torch.float32)
        assert gathered.shape == (3 * BLOCK_SIZE, *written.shape[1:])
        tolerance = 0.0 if kv_dtype == "bfloat16" else float(written.abs().max()) / 250
        torch.testing.assert_close(gathered[3], written[0].float(), rtol=0, atol=tolerance)
        torch.testing.assert_close(gathered[9], written[1].float(), rtol=0, atol=tolerance)
        assert gathered.count_nonzero(dim=(1, 2)).nonzero().flatten().tolist() == [3, 9]
        assert vectors.gather(torch.tensor([1]), torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("magnitude", [1e-30, 1e-4, 1.0, 300.0, 1e6, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_keeps_every_element_within_half_a_scale(dtype: torch.dtype, magnitude: float) -> None:
    """Whatever the vector's magnitude; the scale is the largest element's 127th part."""
    generator = torch.Generator().manual_seed(0)
    vectors = (torch.randn(500, 2, 16, generator=generator) * magnitude).to(dtype)
    integers, scales = quantize(vectors)
    assert integers.dtype == torch.int8
    assert integers.abs().max() == 127
    back = integers.double() * scales.double()[..., None]
    error = (back - vectors.double()).abs()
    assert (error <= scales.double()[..., None] * 0.5001).all()
    largest = vectors.double().abs().amax(dim=-1)
    torch.testing.assert_close(scales.double() * 127, largest, rtol=2**-8, atol=0)


def test_int8_keeps_each_token_and_head_on_its_own() -> None:
    """A vector of another head, a thousand times as large, costs no precision."""
    vectors = torch.randn(7, 2, 16)
    alone, _ = quantize(vectors)
    vectors[:, 1] *= 1000
    vectors[3] *= 1000
    together, _ = quantize(vectors)
    untouched = [0, 1, 2, 4, 5, 6]
    assert torch.equal(together[untouched, 0], alone[untouched, 0])


def test_int8_keeps_zeros_and_the_smallest_numbers() -> None:
    """A vector of zeros comes back as zeros; what is below bfloat16's range never as more."""
    for smallest in (0.0, 1e-45, 1e-40, 3e-39, -2e-38):
        vector = torch.zeros(1, 1, 8)
        vector[..., 0] = smallest
        integers, scales = quantize(vector)
        back = integers.float() * scales.float()[..., None]
        assert not back.isnan().any()
        assert (back[..., 0].abs() <= 1.5 * abs(smallest)).all()
        assert (back[..., 1:] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_int8_gives_back_nan_for_what_is_not_finite(bad: float) -> None:
    """The token and head that has it, so that its request fails; no other token or head."""
    layer = make_layers("int8")[0]
    keys = torch.randn(3, 2, 24)
    keys[1, 0, 5] = bad
    layer.write((torch.tensor([0, 0, 1]), torch.tensor([1, 2, 0])), keys, torch.randn(3, 2, 16))
    gathered = layer.keys.gather(torch.tensor([0, 1]), torch.float32)
    is_nan = gathered.isnan().any(dim=-1)
    assert is_nan.nonzero().tolist() == [[2, 0]]
