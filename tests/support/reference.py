"""What transformers' own `generate` says: the oracle of the equality tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

NEAR_TIE = 1e-4
"""Two best logits that are closer may swap: sums in another order differ that much."""


@dataclass(frozen=True)
class Reference:
    """One greedy generation."""

    tokens: list[int]
    logits: Tensor
    """[num_tokens, vocab_size], float32: what each token was chosen from."""

    def is_near_tie(self, index: int, token: int) -> bool:
        """Whether `token` is as good as the reference's own at `index`."""
        best = self.logits[index, self.tokens[index]]
        return bool(best - self.logits[index, token] < NEAR_TIE)


def load_reference(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a checkpoint the way any user of transformers does."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    return model.eval()


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: Sequence[int], max_tokens: int) -> Reference:
    """Generate greedily, `max_tokens` exactly."""
    ids = torch.tensor([list(prompt)])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Reference(output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits).float())
