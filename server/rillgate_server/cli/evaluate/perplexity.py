"""How well a model predicts a text: exp of the mean negative log-likelihood of its tokens.

A text that is longer than the context is read in windows, each half a window behind the one before;
every token but the first is scored once, in the first window that has it:

    tokens    0 ............................................. num_tokens
    window 0  |- scored --------------|                           (but token 0)
    window 1              |-- context-|-- scored -|
    window 2                          |- context -|-- scored -|

So a token has all of the text before it, or at least half a window of it. Natural logarithms; the
special tokens that the tokenizer adds to a text come once, at its beginning (and its end).

Owns the windows and the sum. Does not know how a log-probability is computed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rillgate_server.cli.evaluate.engine_run import Answer
from rillgate_server.core.request import ChoiceStart, Request
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.errors import ConfigError

_MIN_WINDOW_TOKENS = 2
_MAX_NLL = 700.0
"""Nats; e to the 710 is no float any more."""


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [start, end) of a text, of which those from `first_scored` on are scored."""

    start: int
    first_scored: int
    end: int


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Of one text."""

    num_tokens: int
    """That were scored: all but the first."""
    mean_nll: float
    """Nats per token; not a number where the model gave one that is none."""

    @property
    def value(self) -> float:
        """The perplexity."""
        return math.exp(self.mean_nll) if not self.mean_nll > _MAX_NLL else math.inf


def windows_of(num_tokens: int, max_window_tokens: int) -> list[Window]:
    """Cut a text into windows; both at least 2."""
    windows = [Window(0, 1, min(num_tokens, max_window_tokens))]
    while windows[-1].end < num_tokens:
        last = windows[-1]
        start = last.start + max_window_tokens // 2
        windows.append(Window(start, last.end, min(num_tokens, start + max_window_tokens)))
    return windows


def window_requests(
    token_ids: Sequence[int], max_context_tokens: int, where: str
) -> tuple[list[Window], list[Request]]:
    """Return the windows and a request for each, numbered from 0.

    A request has a token of its own to make, for which the context keeps room.
    """
    max_window_tokens = max_context_tokens - 1
    if len(token_ids) < _MIN_WINDOW_TOKENS or max_window_tokens < _MIN_WINDOW_TOKENS:
        raise ConfigError(
            f"{where} has {len(token_ids)} tokens, and the context {max_context_tokens}; allowed: "
            f"at least {_MIN_WINDOW_TOKENS} and {_MIN_WINDOW_TOKENS + 1}"
        )
    windows = windows_of(len(token_ids), max_window_tokens)
    sampling = SamplingParams(seed=0, temperature=0.0, num_prompt_logprobs=0)
    return windows, [
        Request(number, tuple(token_ids[it.start : it.end]), (ChoiceStart(0),), sampling, 1)
        for number, it in enumerate(windows)
    ]


def measure_perplexity(windows: Sequence[Window], answers: dict[int, Answer]) -> Perplexity:
    """Sum up what the windows' requests got."""
    logprobs = [
        entry.logprob
        for number, window in enumerate(windows)
        # The first entry of a prompt speaks of its second token.
        for entry in answers[number].prompt_logprobs[window.first_scored - window.start - 1 :]
    ]
    num_tokens = windows[-1].end - 1
    if len(logprobs) < num_tokens:  # a window failed: NaN logits at its end
        return Perplexity(num_tokens, math.nan)
    return Perplexity(num_tokens, -math.fsum(logprobs) / num_tokens)
