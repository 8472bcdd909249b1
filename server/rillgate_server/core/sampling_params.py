"""How one choice's tokens are drawn: every value resolved.

Owns the values and their limits. Does not know where defaults come from (the gateway resolves
them) nor how tokens are drawn (worker.sampler does).
"""

import math
from dataclasses import dataclass

from rillgate_server.errors import InvalidRequest

MAX_LOGPROBS = 20
"""Most alternatives per token; the limit that other servers set, too."""
MAX_CHOICES = 64
"""Most choices per request: all must fit into one running batch."""
MAX_LOGIT_BIASES = 1024
"""Most entries of a logit bias."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Everything the sampler needs; the order of application is in the contracts, section 5."""

    seed: int
    """Keys the draws; 64 bits."""
    temperature: float = 1.0
    """0 is argmax, lowest id on ties."""
    top_p: float = 1.0
    """In (0, 1]."""
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    """In [0, 1]."""
    repetition_penalty: float = 1.0
    """Over prompt and generated tokens."""
    presence_penalty: float = 0.0
    """Over generated tokens."""
    frequency_penalty: float = 0.0
    """Over generated tokens, per occurrence."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit)."""
    min_tokens: int = 0
    """Tokens of the choice before which `banned_until_min_tokens` cannot be drawn."""
    banned_until_min_tokens: tuple[int, ...] = ()
    """The ids that would end the choice."""
    num_logprobs: int | None = None
    """Top log-probabilities per token; None = not even the sampled one's."""
    num_prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""

    def validate(self, vocab_size: int) -> None:
        """Raise InvalidRequest that names the first field out of its limits."""
        _in_range("sampling.temperature", self.temperature, 0.0, 100.0)
        _in_range("sampling.top_p", self.top_p, 0.0, 1.0, above=True)
        _in_range("sampling.min_p", self.min_p, 0.0, 1.0)
        _in_range("sampling.repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _in_range("sampling.presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("sampling.frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _in_range("sampling.top_k", self.top_k, 0, vocab_size)
        _in_range("sampling.seed", self.seed, 0, 2**64 - 1)
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise InvalidRequest.of(
                "sampling.logit_bias",
                f"{len(self.logit_bias)} entries",
                f"at most {MAX_LOGIT_BIASES} entries",
            )
        for token_id, bias in self.logit_bias:
            _in_range(f"sampling.logit_bias[{token_id}]", bias, -100.0, 100.0)
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest.of(
                    "sampling.logit_bias", f"token {token_id}", f"token ids below {vocab_size}"
                )
        for field, value in (
            ("response.logprobs", self.num_logprobs),
            ("response.prompt_logprobs", self.num_prompt_logprobs),
        ):
            if value is not None:
                _in_range(field, value, 0, MAX_LOGPROBS)


def _in_range(
    field: str, value: float, lowest: float, highest: float, *, above: bool = False
) -> None:
    """Refuse NaN and what lies outside [lowest, highest], or (lowest, highest] with `above`."""
    inside = lowest < value <= highest if above else lowest <= value <= highest
    if math.isnan(value) or not inside:
        opening = "(" if above else "["
        raise InvalidRequest.of(field, value, f"{opening}{lowest}, {highest}]")
