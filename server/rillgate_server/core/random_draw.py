"""One uniform number per token, from a counter-based generator (contracts, section 5).

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), keyed by
the seed and counted by (position, choice, purpose): the same number in any batch, on any replica.
"""

_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_NUM_ROUNDS = 10

PURPOSE_SAMPLE = 0
"""The draw of a token."""


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Return the four 32-bit words of Philox4x32-10 for a counter and a key of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        product_0 = _MULTIPLIER_0 * c0
        product_1 = _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (
            (product_1 >> 32) ^ c1 ^ k0,
            product_1 & _MASK,
            (product_0 >> 32) ^ c3 ^ k1,
            product_0 & _MASK,
        )
        k0 = (k0 + _WEYL_0) & _MASK
        k1 = (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, choice: int, position: int, purpose: int = PURPOSE_SAMPLE) -> float:
    """Return u in (0, 1) for the token that has `position` tokens of its choice before it."""
    w0, w1, _, _ = philox4x32((position, choice, purpose, 0), (seed & _MASK, seed >> 32 & _MASK))
    return ((w0 >> 6) * 2**26 + (w1 >> 6) + 0.5) / 2**52
