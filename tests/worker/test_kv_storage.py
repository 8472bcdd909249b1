"""The cache's bytes: whole blocks, and no more of them than fit."""

import logging

import pytest
import torch
from torch import Tensor

from rillgate_server.core.model_spec import KVLayout
from rillgate_server.errors import OutOfMemory
from rillgate_server.worker.host_memory import available_bytes
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
    with pytest.raises(OutOfMemory, match=r"a cache tier of .* needs .* free") as caught:
        KVStorage(LAYOUT, 1 << 46)
    assert caught.value.needed_bytes == LAYOUT.block_bytes << 46
    assert 0 < caught.value.free_bytes < caught.value.needed_bytes


def test_memory_that_another_tier_was_promised_is_not_free() -> None:
    """Its pages may not have been handed out yet, and count as free for the system."""
    free_bytes = available_bytes()
    with pytest.raises(OutOfMemory) as caught:
        KVStorage(LAYOUT, 4, taken_bytes=2 * free_bytes)
    assert caught.value.free_bytes == 0


def test_a_tier_may_have_no_blocks() -> None:
    """A cache without a host tier."""
    storage = KVStorage(LAYOUT, 0)
    assert storage.bytes.shape == (0, LAYOUT.block_bytes)
    assert storage.num_bytes == 0


def test_a_pinned_tier_is_pinned_whole_and_once() -> None:
    """The pin gets all bytes."""
    pinned: list[Tensor] = []
    storage = KVStorage(LAYOUT, 3, pin=pinned.append)
    assert storage.is_pinned
    assert storage.num_pageable_blocks == 0
    assert [memory.data_ptr() for memory in pinned] == [storage.bytes.data_ptr()]
    assert pinned[0].numel() == 3 * LAYOUT.block_bytes


def test_memory_that_cannot_be_pinned_is_pageable_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The tier works; the log says how much was asked for, why not, and what can be done."""

    def refuse(memory: Tensor) -> None:
        raise OSError("no more locked memory")

    with caplog.at_level(logging.WARNING):
        storage = KVStorage(LAYOUT, 3, pin=refuse)
    assert not storage.is_pinned
    assert storage.num_pageable_blocks == 3
    storage.bytes[2].fill_(1)
    assert int(storage.bytes.sum(dtype=torch.int64)) == LAYOUT.block_bytes
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith(f"{3 * LAYOUT.block_bytes} bytes of pinned memory")
    for part in ("no more locked memory", "pageable", "cache.host_memory"):
        assert part in said


def test_a_tier_that_is_not_to_be_pinned_is_not() -> None:
    """Nor does it say so: on a CPU there is nobody to pin for."""
    storage = KVStorage(LAYOUT, 3)
    assert not storage.is_pinned
    assert storage.num_pageable_blocks == 0
