"""The prompt's digest: fixed bytes, since gateways of different versions compare it."""

from hashlib import blake2b

from rillgate_server.gateway.text.prompt_digest import prompt_digest


def test_the_digest_is_of_little_endian_words() -> None:
    """Spelt out by hand, with an id that needs all four bytes."""
    data = bytes([1, 0, 0, 0]) + bytes([0x78, 0x56, 0x34, 0x12])
    assert prompt_digest([1, 0x12345678]) == blake2b(data, digest_size=16).digest()


def test_the_digest_is_the_same_everywhere() -> None:
    """A committed vector."""
    assert prompt_digest([256, 259, 72]).hex() == "35ec6135ad8197be6297f278b2e847ac"
    assert len(prompt_digest([])) == 16
