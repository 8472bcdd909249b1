"""What the sampler remembers of one slot: its parameters, how far it is, and what it has said.

One SlotSampling lives from a SlotStart to the plan that ends the slot; the model runner appends
each sampled token. Does not know logits, rows, or other slots.
"""

import torch
from torch import Tensor

from rillgate_server.core.random_draw import uniform
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import SlotStart


class SlotSampling:
    """The sampler's state of one slot.

    State: `num_generated`, `output_counts`, `seen`. The two tensors exist only where a penalty
    needs them: most requests have none, and a vocabulary is large.
    """

    def __init__(self, params: SamplingParams, choice_index: int) -> None:
        """Start with nothing said; `start` replays what a slot already has."""
        self.params = params
        self.choice_index = choice_index
        self.num_generated = 0
        self.output_counts: Tensor | None = None
        """[vocab_size], float64: occurrences among the generated tokens."""
        self.seen: Tensor | None = None
        """[vocab_size], bool: in the prompt or among the generated tokens."""
        self.bias_ids = torch.tensor(
            [token_id for token_id, _ in params.logit_bias], dtype=torch.long
        )
        """[num_biases], int64."""
        self.bias_values = torch.tensor(
            [bias for _, bias in params.logit_bias], dtype=torch.float64
        )
        """[num_biases], float64."""

    @classmethod
    def start(
        cls, start: SlotStart, vocab_size: int, *, keeps_history: bool = True
    ) -> "SlotSampling":
        """Build the state of a slot that already has `start.token_ids`.

        `keeps_history`: what penalties need; where a GPU draws, it has that itself.
        """
        params = start.sampling
        state = cls(params, start.choice_index)
        if not keeps_history:
            state.num_generated = len(start.token_ids) - start.num_prompt_tokens
            return state
        if params.repetition_penalty != 1.0:
            state.seen = torch.zeros(vocab_size, dtype=torch.bool)
            state.seen[list(start.token_ids[: start.num_prompt_tokens])] = True
        if params.presence_penalty or params.frequency_penalty:
            state.output_counts = torch.zeros(vocab_size, dtype=torch.float64)
        for token_id in start.token_ids[start.num_prompt_tokens :]:
            state.append(token_id)
        return state

    def __repr__(self) -> str:
        """Show what a debugger asks for first."""
        return (
            f"SlotSampling(choice_index={self.choice_index}, num_generated={self.num_generated}, "
            f"params={self.params})"
        )

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the token is the argmax of the raw logits."""
        return self.params.temperature == 0.0 and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        """Whether anything is applied to the logits before the temperature."""
        return bool(
            self.seen is not None
            or self.output_counts is not None
            or self.params.logit_bias
            or self.num_generated < self.params.min_tokens
        )

    def append(self, token_id: int) -> None:
        """Note one token of the choice."""
        self.num_generated += 1
        if self.seen is not None:
            self.seen[token_id] = True
        if self.output_counts is not None:
            self.output_counts[token_id] += 1

    def next_uniform(self) -> float:
        """Return the number that draws the next token."""
        return uniform(self.params.seed, self.choice_index, self.num_generated)

    def adjust(self, logits: Tensor) -> None:
        """Apply ban, bias and penalties in place. `logits`: [vocab_size], float64."""
        params = self.params
        if self.num_generated < params.min_tokens:
            logits[list(params.banned_until_min_tokens)] = -torch.inf
        if params.logit_bias:
            logits[self.bias_ids] += self.bias_values
        if self.seen is not None:
            said = logits[self.seen]
            penalty = params.repetition_penalty
            logits[self.seen] = torch.where(said > 0, said / penalty, said * penalty)
        if self.output_counts is not None:
            logits -= params.presence_penalty * (self.output_counts > 0)
            logits -= params.frequency_penalty * self.output_counts
