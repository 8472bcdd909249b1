"""Padded batches of training examples of similar length.

Owns grouping and padding. Knows nothing of what the examples say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch

from tools.train_demo.examples import MARK_IDS, Example
from tools.train_demo.tokenizer import PAD

# cross_entropy skips this target.
IGNORED = -100
# Widths of batches are multiples of these. Few widths, each always with the same number of rows,
# because the CPU's matrix kernels are made anew for each new shape: with free shapes training ran
# at less than half the speed.
_FINE_WIDTH = 16
_COARSE_WIDTH = 128
_COARSE_FROM = 256


def padded_width(num_tokens: int) -> int:
    """Round a number of tokens up to one of the few widths that batches have."""
    unit = _FINE_WIDTH if num_tokens <= _COARSE_FROM else _COARSE_WIDTH
    return -(-num_tokens // unit) * unit


def to_tensors(group: list[Example], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets, [examples, width] int64; IGNORED marks what is not learned.

    Padding stands on the right, so causal attention alone keeps it out of what is learned.
    """
    inputs = torch.full((len(group), width), MARK_IDS[PAD])
    targets = torch.full((len(group), width), IGNORED)
    for row, example in enumerate(group):
        ids = torch.tensor(example.token_ids)
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, example.learned_from - 1 : len(ids) - 1] = ids[example.learned_from :]
    return inputs, targets


def batch_stream(
    examples: Iterator[Example], max_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a batch of one width whenever so many of its examples have come that it is full."""
    waiting: dict[int, list[Example]] = defaultdict(list)  # width -> examples
    for example in examples:
        width = padded_width(len(example.token_ids) - 1)
        group = waiting[width]
        group.append(example)
        if len(group) == max(1, max_tokens // width):
            yield to_tensors(waiting.pop(width), width)
