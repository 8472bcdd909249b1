"""Drafts from a choice's own tokens: what followed the same tokens the last time.

Owns the index of one choice's tokens. Does not know whether a draft pays, nor what becomes of it.

    tokens    … a b c d e … a b c          the latest earlier place that ends like the tokens do
                      ▲ ▲                  (here in `a b c`), and what followed there: `d e …`
                      drafts

Every pair of neighbours leads to the latest place that ends with it, each place to the one before
with the same pair: a step adds its tokens and looks at a few places, however long the text is.
Method: Saxena, "Prompt Lookup Decoding", 2023.
"""

from collections.abc import Sequence

MAX_MATCH_TOKENS = 4
"""Tokens before a draft that are compared: the place that agrees in most of them is taken."""
MIN_MATCH_TOKENS = 2
"""What the index is made of: a single token recurs everywhere and says little."""
_MAX_PLACES = 16
"""Looked at for a longer match than a pair: the latest ones."""
_TOKEN_BITS = 32


class PromptLookup:
    """The index of one choice. State: places by pair, and of each place the one before it."""

    __slots__ = ("_before", "_latest")

    def __init__(self) -> None:
        """Start with no tokens indexed."""
        self._latest: dict[int, int] = {}  # pair of tokens -> index of the latest one's second
        self._before: list[int] = []  # index -> that of the same pair before it; -1: none

    def __repr__(self) -> str:
        return f"PromptLookup(tokens={len(self._before)}, pairs={len(self._latest)})"

    def propose(self, token_ids: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """Return up to `max_tokens` that may follow; none where the end was never seen before.

        `token_ids` are those of the last call, and more. O(new tokens).
        """
        self._add(token_ids)
        place = self._best_place(token_ids)
        if place < 0:
            return ()
        period = len(token_ids) - 1 - place
        # Near the end a match runs into itself: what repeats goes on repeating.
        return tuple(token_ids[place + 1 + i % period] for i in range(max_tokens))

    def _add(self, token_ids: Sequence[int]) -> None:
        latest, before = self._latest, self._before
        for index in range(len(before), len(token_ids)):
            if index == 0:
                before.append(-1)
                continue
            pair = token_ids[index - 1] << _TOKEN_BITS | token_ids[index]
            before.append(latest.get(pair, -1))
            latest[pair] = index

    def _best_place(self, token_ids: Sequence[int]) -> int:
        """Return where the earlier text ends like all of it; of equal matches the latest."""
        if len(token_ids) <= MIN_MATCH_TOKENS:
            return -1
        best, longest = -1, 0
        place = self._before[len(token_ids) - 1]
        for _ in range(_MAX_PLACES):
            if place < 0:
                break
            num_equal = _num_equal(token_ids, place)
            if num_equal > longest:
                best, longest = place, num_equal
            if longest == MAX_MATCH_TOKENS:
                break
            place = self._before[place]
        return best


def _num_equal(token_ids: Sequence[int], place: int) -> int:
    """Count the tokens up to `place` that equal those at the end, up to MAX_MATCH_TOKENS."""
    last = len(token_ids) - 1
    most = min(MAX_MATCH_TOKENS, place + 1)
    for num_equal in range(most):
        if token_ids[place - num_equal] != token_ids[last - num_equal]:
            return num_equal
    return most
