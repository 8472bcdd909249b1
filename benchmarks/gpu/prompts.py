"""Prompts of random tokens, the same in every process that names the same seed and number."""

import random
from collections.abc import Sequence

_FIRST_TOKEN = 2
"""Before it stand <bos> and <eos>."""


def prompt(seed: str, number: int, num_tokens: int, vocab_size: int) -> list[int]:
    """Return one; seeds differ between questions, so nothing comes from the prefix cache."""
    draw = random.Random(f"{seed}/{number}")
    return draw.choices(range(_FIRST_TOKEN, vocab_size), k=num_tokens)


def prompts(seed: str, count: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    """Return the first `count` of a seed."""
    return [prompt(seed, number, num_tokens, vocab_size) for number in range(count)]


def staggered_lens(count: int) -> Sequence[int]:
    """Return lengths of answers with which a batch of `count` shrinks one by one, or nearly.

    A warm-up with them meets every size of batch that a server prepares something for.
    """
    return [4 + number // 2 for number in range(count)]
