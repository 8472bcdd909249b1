"""Draft models for the fake data plane: from always right to always guessing."""

import random
from collections.abc import Callable

from rillgate_server.engine.testing import FakeExecutor, FakeSlot


def random_draft_model(
    rng: random.Random, fake: FakeExecutor
) -> Callable[[FakeSlot], tuple[int, ...]]:
    """Make a draft model that is right so often, and guesses, or says less, where it is not."""
    chance = rng.choice((0.0, 0.5, 0.9, 1.0))

    def propose(slot: FakeSlot) -> tuple[int, ...]:
        ahead = slot.copy()
        for _ in range(rng.randint(0, 8)):
            is_right = rng.random() < chance
            ahead.append((fake.next_token(ahead) if is_right else rng.randint(0, 99),))
        return tuple(ahead.token_ids[len(slot.token_ids) :])

    return propose
