"""The mixed batch that every path through the engine must answer as `generate` does."""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rillgate_server.core.step import TokenLogprobs
from tests.support.checkpoints import VOCAB_SIZE
from tests.support.reference import Reference, generate

NUM_TOKENS = 20
"""Generated per request."""

PROMPT_LENGTHS = (1, 2, 3, 5, 17, 33, 64, 90, 41, 65, 43, 70)
"""Shorter and longer than blocks, chunks and windows."""
PARENT = 7
"""The request whose prefix the later ones of odd index share."""

Rerun = Callable[[Sequence[int], Sequence[int]], list[int]]
"""Generates for (prompt, tokens given before) alone; returns all tokens, given ones included."""


def mixed_prompts(seed: int = 1) -> list[list[int]]:
    """Make the 12 prompts; those of odd index from PARENT on begin alike."""
    rng = random.Random(seed)
    base = [rng.randrange(VOCAB_SIZE) for _ in range(max(PROMPT_LENGTHS))]
    prompts = []
    for i, length in enumerate(PROMPT_LENGTHS):
        if i % 2 and i >= PARENT:
            tail = [rng.randrange(VOCAB_SIZE) for _ in range(3)] if i > PARENT else []
            prompts.append(base[: length - len(tail)] + tail)
        else:
            prompts.append([rng.randrange(VOCAB_SIZE) for _ in range(length)])
    return prompts


def references(model: PreTrainedModel) -> list[Reference]:
    """Generate for each of the mixed prompts alone."""
    return [generate(model, prompt, NUM_TOKENS) for prompt in mixed_prompts()]


def first_difference(
    prompt: Sequence[int], tokens: Sequence[int], reference: Reference, rerun: Rerun
) -> int | None:
    """Return the first index at which tokens are wrong; None = equal.

    Where the reference's choice was a near tie both are accepted, and the comparison goes on from
    the reference's token.
    """
    if len(tokens) != len(reference.tokens):
        return min(len(tokens), len(reference.tokens))
    for i, (ours, theirs) in enumerate(zip(tokens, reference.tokens, strict=True)):
        if ours == theirs:
            continue
        if not reference.is_near_tie(i, ours):
            return i
        given = reference.tokens[: i + 1]
        again = rerun(prompt, given)
        return first_difference(prompt, again, reference, rerun)
    return None


def logprob_error(entries: Sequence[TokenLogprobs], reference: Reference) -> float:
    """Return the largest difference of full rows of log-probabilities, up to a first difference."""
    worst = 0.0
    expected = torch.log_softmax(reference.logits, dim=-1)
    for i, entry in enumerate(entries):
        worst = max(worst, float((full_row(entry) - expected[i]).abs().max()))
        if entry.token_id != reference.tokens[i]:
            break
    return worst


def full_row(entry: TokenLogprobs) -> Tensor:
    """Return one position's log-probabilities in vocabulary order. [vocab_size], float32."""
    assert len(entry.top) == VOCAB_SIZE
    row = torch.empty(VOCAB_SIZE)
    row[[token for token, _ in entry.top]] = torch.tensor([value for _, value in entry.top])
    return row
