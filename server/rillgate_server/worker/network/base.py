"""The network, as the model runner sees it: tokens in, hidden states and logits out."""

from typing import Protocol

from torch import Tensor

from rillgate_server.worker.attention.base import AttentionStep
from rillgate_server.worker.collectives import Collectives


class Network(Protocol):
    """A decoder-only model with paged attention. Called from one thread, in inference mode."""

    @property
    def num_heads(self) -> int:
        """Of queries, on this rank."""
        ...

    @property
    def is_capturable(self) -> bool:
        """Whether a step launches the same work whatever its tokens are, and never waits for the
        device: a CUDA graph can hold it."""
        ...

    @property
    def is_split(self) -> bool:
        """Whether other ranks compute with it, and wait in collectives for this one."""
        ...

    def hidden(self, tokens: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        """Run all layers over a packed step.

        tokens, positions: [num_tokens], int64. Returns [num_tokens, hidden_size], model dtype.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Apply the output head. hidden: [num, hidden_size]. Returns [num, vocab_size].

        Of a split model's ranks, all must call it and rank 0 alone gets the logits.
        """
        ...


def join_logits(logits: Tensor, vocab_size: int, collectives: Collectives | None) -> Tensor | None:
    """Join what all ranks' parts of the output head gave, on rank 0; `collectives` None: whole."""
    if collectives is None:
        return logits
    joined = collectives.gather_columns(logits)
    # Past the vocabulary lie the zeros that fill the last rank's part up.
    return None if joined is None else joined[:, :vocab_size]
