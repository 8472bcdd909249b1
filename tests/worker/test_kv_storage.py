"""The cache's bytes: whole blocks, and no more of them than fit."""

import pytest

from rillgate_server.core.model_spec import KVLayout
from rillgate_server.errors import OutOfMemory
from rillgate_server.worker.kv_storage import KVStorage

LAYOUT = KVLayout.build(
    4, "bfloat16", (((2, 24), (2, 16), None), ((2, 24), (2, 16), 8), ((1, 5), (1, 3), None))
)


def test_a_block_is_one_contiguous_run_of_bytes() -> None:
    """Clearing a block clears it in all layers, and no other block."""
    storage = KVStorage(LAYOUT, 3)
    for layer in storage.layers:
        layer.keys.tokens.fill_(1)
        layer.values.tokens.fill_(1)
    storage.clear([1])
    for layer in storage.layers:
        for view in (layer.keys.tokens, layer.values.tokens):
            assert view[1].count_nonzero() == 0
            assert (view[0] == 1).all()
            assert (view[2] == 1).all()


def test_a_cache_that_does_not_fit_says_needed_and_free() -> None:
    """A pool of a hundred million gigabytes is refused before anything is reserved."""
    with pytest.raises(OutOfMemory, match=r"a cache of .* needs .* free") as caught:
        KVStorage(LAYOUT, 1 << 46)
    assert caught.value.needed_bytes == LAYOUT.block_bytes << 46
    assert 0 < caught.value.free_bytes < caught.value.needed_bytes
