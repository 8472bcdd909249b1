"""An embedding in INT8, with a scale per token's row.

Owns the lookup. Its rows may be an output head's, too, of a model that ties the two.
"""

import torch
from torch import Tensor, nn

from rillgate_server.worker.quantization.int8 import Int8Linear


class Int8Embedding(nn.Module):
    """`nn.Embedding` over the rows of an INT8 layer. State: none."""

    def __init__(self, table: Int8Linear, dtype: torch.dtype) -> None:
        """Look rows up in `table`, which others may share; they are computed on in `dtype`."""
        super().__init__()
        self.table = table
        self.num_embeddings = table.out_features
        self._dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [*tokens.shape, hidden_size]."""
        rows = self.table.rows(tokens.flatten())
        return rows.to(self._dtype).view(*tokens.shape, -1)
