"""The cache's bytes: segments lie where the layout says and never overlap."""

import pytest
import torch

from rillgate_server.core.model_spec import KVLayout
from rillgate_server.errors import OutOfMemory
from rillgate_server.worker.kv_storage import KVStorage

LAYOUT = KVLayout.build(
    4, "bfloat16", (((2, 24), (2, 16), None), ((2, 24), (2, 16), 8), ((1, 5), (1, 3), None))
)


def test_every_segment_keeps_what_was_written_to_it() -> None:
    """Each layer's keys and values hold a number of their own in every block."""
    storage = KVStorage(LAYOUT, 3)
    views = [view for layer in storage.layers for view in (layer.keys, layer.values)]
    for i, view in enumerate(views):
        view.fill_(i + 1)
    for i, view in enumerate(views):
        assert (view == i + 1).all()


def test_a_block_is_one_contiguous_run_of_bytes() -> None:
    """Clearing a block clears it in all layers, and no other block."""
    storage = KVStorage(LAYOUT, 3)
    for layer in storage.layers:
        layer.keys.fill_(1)
        layer.values.fill_(1)
    storage.clear([1])
    for layer in storage.layers:
        for view in (layer.keys, layer.values):
            assert view[1].count_nonzero() == 0
            assert (view[0] == 1).all()
            assert (view[2] == 1).all()


def test_tokens_are_written_where_the_slot_mapping_says() -> None:
    """Both views of a layer show the same memory."""
    storage = KVStorage(LAYOUT, 3)
    layer = storage.layers[0]
    keys, values = torch.randn(2, 2, 24).bfloat16(), torch.randn(2, 2, 16).bfloat16()
    layer.write((torch.tensor([2, 0]), torch.tensor([3, 1])), keys, values)
    assert torch.equal(layer.keys[2, 3], keys[0])
    assert torch.equal(layer.values[0, 1], values[1])
    assert torch.equal(layer.key_blocks[2].view(4, 2, 24)[3], keys[0])
    assert layer.keys.count_nonzero() == keys.count_nonzero()


def test_a_cache_that_does_not_fit_says_needed_and_free() -> None:
    """A pool of a hundred million gigabytes is refused before anything is reserved."""
    with pytest.raises(OutOfMemory, match=r"a cache of .* needs .* free") as caught:
        KVStorage(LAYOUT, 1 << 46)
    assert caught.value.needed_bytes == LAYOUT.block_bytes << 46
    assert 0 < caught.value.free_bytes < caught.value.needed_bytes
