"""A mixture's experts as layers of their own, each quantised or not.

What transformers' stacked experts compute one after another, each expert's products over its own
tokens. Owns the forward pass. Does not know routing, files or how a layer is quantised.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Layers = Sequence[nn.Module]


class QuantizedExperts(nn.Module):
    """The experts of one layer. State: none."""

    def __init__(
        self, gates: Layers, ups: Layers, downs: Layers, act_fn: Callable[[Tensor], Tensor]
    ) -> None:
        """Take a layer of each kind per expert, and what is between them."""
        super().__init__()
        self.gates, self.ups, self.downs = (nn.ModuleList(it) for it in (gates, ups, downs))
        self.act_fn = act_fn

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts.

        hidden_states: [num_tokens, hidden_size]; top_k_index, top_k_weights: [num_tokens, k].
        """
        total = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            tokens, place = torch.where(top_k_index == expert)
            x = hidden_states[tokens]
            inner = self.act_fn(self.gates[expert](x)) * self.ups[expert](x)
            output = self.downs[expert](inner) * top_k_weights[tokens, place, None]
            total.index_add_(0, tokens, output.to(total.dtype))
        return total
