"""How many blocks each tier of the cache gets."""

from dataclasses import replace

import pytest

from rillgate_server.config.groups import CacheConfig
from rillgate_server.core.model_spec import CacheSizes, FreeMemory
from rillgate_server.errors import ConfigError, OutOfMemory
from rillgate_server.replica.cache_size import CacheDemand, choose_cache_sizes

BLOCK_BYTES = 100_000
CONTEXT = CacheDemand(100, 4096, 16, BLOCK_BYTES, "bfloat16")
"""Seven blocks for a request of the context length."""
MEGABYTE = 1_000_000


def sizes(
    device: str, host: str, free: FreeMemory, demand: CacheDemand = CONTEXT
) -> tuple[int, int]:
    """Return the blocks of both tiers."""
    chosen = choose_cache_sizes(CacheConfig(device, host), free, demand)
    assert (chosen.block_bytes, chosen.kv_dtype) == (demand.block_bytes, demand.kv_dtype)
    return chosen.num_device_blocks, chosen.num_host_blocks


def on_cpu(num_bytes: int) -> FreeMemory:
    """One memory for both tiers."""
    return FreeMemory(num_bytes, num_bytes, is_shared=True)


def on_gpu(device_bytes: int, host_bytes: int) -> FreeMemory:
    """A GPU's memory and the host's."""
    return FreeMemory(device_bytes, host_bytes, is_shared=False)


@pytest.mark.parametrize(
    ("device", "host", "free", "expected"),
    [
        ("950KB", "0", on_cpu(5 * MEGABYTE), (9, 0)),
        ("950KB", "1.99MB", on_cpu(5 * MEGABYTE), (9, 19)),
        ("0.4", "0.5", on_cpu(10 * MEGABYTE), (40, 50)),
        ("0.4", "0.5", on_gpu(10 * MEGABYTE, 20 * MEGABYTE), (40, 100)),
        ("auto", "auto", on_cpu(10 * MEGABYTE), (50, 0)),
        ("auto", "4MB", on_cpu(10 * MEGABYTE), (30, 40)),
        ("auto", "auto", on_gpu(10 * MEGABYTE, 20 * MEGABYTE), (50, 100)),
        ("auto", "auto", on_gpu(10 * MEGABYTE, MEGABYTE), (50, 0)),
        ("auto", "0", replace(on_gpu(10 * MEGABYTE, MEGABYTE), is_measured=True), (95, 0)),
        ("auto", "20MB", on_gpu(10 * MEGABYTE, 20 * MEGABYTE), (50, 200)),
        ("5MB", "5MB", on_cpu(10 * MEGABYTE), (50, 50)),
        ("700KB", "700KB", on_cpu(10 * MEGABYTE), (7, 7)),
    ],
)
def test_sizes_are_whole_blocks_of_what_is_configured_or_free(
    device: str, host: str, free: FreeMemory, expected: tuple[int, int]
) -> None:
    """Bytes, fractions and auto, for one memory and for two; a GPU's host tier never takes from the
    device tier, a CPU's does."""
    assert sizes(device, host, free) == expected


@pytest.mark.parametrize(
    "config",
    [
        CacheConfig("auto", "4MB", load_policy="recompute"),
        CacheConfig("auto", "4MB", prefix_caching=False),
    ],
)
def test_a_host_tier_that_nobody_would_read_is_not_reserved(config: CacheConfig) -> None:
    """Its memory is the device tier's to take."""
    chosen = choose_cache_sizes(config, on_cpu(10 * MEGABYTE), CONTEXT)
    assert (chosen.num_device_blocks, chosen.num_host_blocks) == (50, 0)


def test_auto_takes_no_more_than_is_useful() -> None:
    """Two choices with a context of 33 tokens hold three blocks each; twice that is 12."""
    demand = CacheDemand(33, 2, 16, BLOCK_BYTES, "int8")
    assert sizes("auto", "auto", on_cpu(1 << 40), demand) == (12, 0)


@pytest.mark.parametrize(
    ("device", "host", "free", "says"),
    [
        ("6MB", "0", on_cpu(5 * MEGABYTE), r"cache\.device_memory needs .*6000000.*5000000"),
        ("auto", "6MB", on_cpu(5 * MEGABYTE), r"cache\.host_memory needs .*6000000.*5000000"),
        (
            "3MB",
            "0.5",
            on_cpu(5 * MEGABYTE),
            r"cache\.device_memory and cache\.host_memory together needs .*5500000.*5000000",
        ),
        (
            "6MB",
            "1MB",
            on_gpu(5 * MEGABYTE, 9 * MEGABYTE),
            r"device_memory needs .*6000000.*500000",
        ),
        ("1MB", "9MB", on_gpu(50 * MEGABYTE, MEGABYTE), r"host_memory needs .*9000000.*1000000"),
    ],
)
def test_a_size_that_is_not_free_says_needed_and_free(
    device: str, host: str, free: FreeMemory, says: str
) -> None:
    """Each tier alone, and both where they share a memory."""
    with pytest.raises(OutOfMemory, match=says):
        sizes(device, host, free)


def test_a_draft_model_s_cache_is_paid_from_the_device_tier() -> None:
    """Fewer device blocks, as many host blocks; a tier too small for both is refused."""
    demand = replace(CONTEXT, draft_block_bytes=BLOCK_BYTES // 4)
    assert sizes("5MB", "5MB", on_cpu(10 * MEGABYTE), demand) == (40, 50)
    with pytest.raises(ConfigError, match="6 blocks of 125000 bytes, but one request"):
        sizes("800KB", "0", on_cpu(10 * MEGABYTE), demand)


def test_a_device_tier_below_one_request_of_the_context_length_is_refused() -> None:
    """Six blocks where seven are needed: the numbers, and the other way out."""
    with pytest.raises(ConfigError) as caught:
        sizes("699KB", "0", on_cpu(10 * MEGABYTE))
    assert str(caught.value) == (
        "cache.device_memory is '699KB': 6 blocks of 100000 bytes, but one request of the context "
        "length, 100 tokens, needs 7 blocks, 700000 bytes; allowed: at least that, or a lower "
        "model.max_context_tokens"
    )


def test_an_automatic_device_tier_below_it_says_what_was_free() -> None:
    """Half of 1.3 MB is six blocks; so is half of what a host tier of 1 MB leaves of 2.3 MB."""
    for host, free in (("0", on_cpu(1_300_000)), ("1MB", on_cpu(2_300_000))):
        with pytest.raises(ConfigError, match=r"0.5 of the 1300000 bytes.*6 blocks.*needs 7 bl"):
            sizes("auto", host, free)


def test_a_host_tier_below_it_is_refused_too() -> None:
    """A request that is swapped must have room there, whoever else is."""
    with pytest.raises(ConfigError, match=r"cache\.host_memory is '699KB': 6 .*or 0 for no host"):
        sizes("1MB", "699KB", on_cpu(10 * MEGABYTE))


def test_the_cache_type_is_the_layout_s() -> None:
    """It is what a replica tells its gateway."""
    demand = CacheDemand(16, 1, 16, BLOCK_BYTES, "int8")
    chosen = choose_cache_sizes(CacheConfig("1MB", "0"), on_cpu(10 * MEGABYTE), demand)
    assert chosen == CacheSizes(10, BLOCK_BYTES, "int8", 0)
