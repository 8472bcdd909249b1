"""Networks that pass on to another one, for tests that change what it is told or what it does."""

from torch import Tensor

from rillgate_server.worker.attention.base import AttentionStep
from rillgate_server.worker.network.base import Network


class PassingNetwork:
    """Passes everything on (Network); to be derived from."""

    def __init__(self, network: Network) -> None:
        """Pass on to `network`."""
        self.network = network
        self.is_split = network.is_split
        self.is_capturable = network.is_capturable
        self.num_heads = network.num_heads

    def hidden(self, tokens: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        """Pass on."""
        return self.network.hidden(tokens, positions, step)

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Pass on."""
        return self.network.logits(hidden)
