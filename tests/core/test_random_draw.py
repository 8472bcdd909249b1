"""The draws: known answers and shape of the distribution."""

import pytest

from rillgate_server.core.random_draw import philox4x32, uniform

# The known-answer vectors that the authors of Philox publish with Random123 (kat_vectors).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    """The generator is the published one, so any language can repeat our draws."""
    assert philox4x32(counter, key) == words


def test_uniform_is_inside_the_open_interval_and_spread_evenly() -> None:
    """A thousand draws fill ten bins, none with less than half or more than twice its share."""
    draws = [uniform(seed=7, choice=0, position=i) for i in range(1000)]
    assert all(0.0 < u < 1.0 for u in draws)
    bins = [sum(k / 10 <= u < (k + 1) / 10 for u in draws) for k in range(10)]
    assert min(bins) > 50
    assert max(bins) < 200


def test_uniform_depends_on_seed_choice_and_position() -> None:
    """Changing any of the three, the seed's high half included, changes the number."""
    base = uniform(1, 2, 3)
    others = {uniform(0, 2, 3), uniform(1 + 2**32, 2, 3), uniform(1, 0, 3), uniform(1, 2, 4)}
    assert base not in others
    assert len(others) == 4
