"""Amounts of memory as operators write them."""

import pytest

from rillgate_server.config.groups import CacheConfig
from rillgate_server.config.memory_size import MemorySize, parse_memory_size
from rillgate_server.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("65536", 65536),
        ("8589934592", 8 << 30),
        ("500MB", 500_000_000),
        ("8GiB", 8 << 30),
        ("1.5 GiB", 3 << 29),
        ("100kb", 100_000),
        ("64KiB", 64 << 10),
        ("2gb", 2_000_000_000),
        ("3TB", 3 * 10**12),
        ("1TiB", 1 << 40),
        ("3MiB", 3 << 20),
        (f"{(1 << 50) - 1}", (1 << 50) - 1),
        ("0", 0),
        ("0GB", 0),
    ],
)
def test_bytes_may_have_a_unit(text: str, num_bytes: int) -> None:
    """Decimal and binary units, in either case, with or without a space; bytes to the last one."""
    size = parse_memory_size("f", text, may_be_zero=True)
    assert size == MemorySize(num_bytes=num_bytes)
    assert size.of(5) == num_bytes


def test_a_fraction_is_of_what_is_free() -> None:
    """0.4 of 1000 bytes."""
    assert parse_memory_size("f", "0.4", may_be_zero=False).of(1000) == 400


def test_auto_leaves_it_to_the_user_of_the_setting() -> None:
    """No number comes out, whatever is free."""
    size = parse_memory_size("f", "Auto", may_be_zero=False)
    assert size.of(1000) is None
    assert size == MemorySize()


@pytest.mark.parametrize(
    "text",
    [
        *("", "lots", "-1GiB", "1", "65535", "63KiB", "1.0", "2PiB", "1025TiB", "1e9", "nan"),
        *("0x10", "8 Gi B", "8Gb/s", "0.5.1", "\u0663GiB"),
    ],
)
def test_anything_else_is_refused_with_what_is_allowed(text: str) -> None:
    """Field, value and the whole list of what could stand there."""
    with pytest.raises(ConfigError) as caught:
        parse_memory_size("cache.host_memory", text, may_be_zero=True)
    said = str(caught.value)
    assert said.startswith(f"cache.host_memory is {text!r}; allowed: auto, 0 (none), 64KiB to 1PiB")
    assert "fraction" in said


@pytest.mark.parametrize("text", ["9" * 5000, "9" * 400 + ".5"])
def test_an_endless_number_is_refused_like_any_other(text: str) -> None:
    """Python would refuse it in words of its own."""
    with pytest.raises(ConfigError, match=r"^cache\.host_memory is '999.{0,200}allowed"):
        parse_memory_size("cache.host_memory", text, may_be_zero=True)


def test_the_host_tier_may_be_left_out_and_the_device_tier_may_not() -> None:
    """Settings are checked when they are read."""
    assert CacheConfig(host_memory="0").host_memory == "0"
    with pytest.raises(ConfigError, match=r"cache\.device_memory is '0'; allowed: auto, 64KiB"):
        CacheConfig(device_memory="0")
    with pytest.raises(ConfigError, match=r"cache\.host_memory is 'much'"):
        CacheConfig(host_memory="much")
