"""Prompt lookup finds what followed the longest, latest earlier occurrence of the last tokens."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rillgate_server.scheduler.prompt_lookup import (
    MAX_MATCH_TOKENS,
    MIN_MATCH_TOKENS,
    PromptLookup,
)


def slow_propose(token_ids: Sequence[int], max_tokens: int) -> tuple[int, ...]:
    """Try the longest match first, at each earlier place from the latest on."""
    tokens = list(token_ids)
    for length in range(MAX_MATCH_TOKENS, MIN_MATCH_TOKENS - 1, -1):
        end = tokens[len(tokens) - length :]
        for place in range(len(tokens) - 1, length - 1, -1):
            if len(end) == length and tokens[place - length : place] == end:
                drafts = tokens[place:]
                while len(drafts) < max_tokens:
                    drafts += tokens[place:]
                return tuple(drafts[:max_tokens])
    return ()


@given(st.lists(st.integers(0, 3), max_size=18), st.integers(1, 7))
def test_it_proposes_what_a_search_through_everything_finds(
    token_ids: list[int], max_tokens: int
) -> None:
    """The longest match of up to four tokens, the latest of equals, and what followed there."""
    assert PromptLookup().propose(token_ids, max_tokens) == slow_propose(token_ids, max_tokens)


@pytest.mark.parametrize("seed", range(20))
def test_an_index_that_grows_step_by_step_finds_the_same(seed: int) -> None:
    """Whatever the steps, and though each pair occurs in a few of the latest places only."""
    rng = random.Random(seed)
    tokens: list[int] = []
    lookup = PromptLookup()
    while len(tokens) < 60:
        tokens += [rng.randrange(9) for _ in range(rng.randint(1, 4))]
        assert lookup.propose(tokens, 5) == slow_propose(tokens, 5)


def test_what_repeats_itself_is_continued_past_its_end() -> None:
    """A period shorter than the drafts goes round."""
    assert PromptLookup().propose([9, 1, 2, 3, 1, 2, 3], 7) == (1, 2, 3, 1, 2, 3, 1)
    assert PromptLookup().propose([5, 4, 4, 4], 3) == (4, 4, 4)


@pytest.mark.parametrize("token_ids", [[], [1], [1, 1], [1, 2, 3, 4], [3, 1, 9, 1]])
def test_nothing_is_proposed_where_the_last_two_tokens_are_new(token_ids: list[int]) -> None:
    """A single token that was seen before is not enough."""
    assert PromptLookup().propose(token_ids, 4) == ()
