"""Any supported architecture, built by transformers, with our attention put in.

Owns how our attention gets into transformers' modules: it is registered under a name, and each
step's metadata reaches it in the forward call's keyword arguments (no globals). Does not know
weights files (worker.model_loader fills the network) nor how attention is computed.
"""

from typing import Any

from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)

from rillgate_server.worker.attention.base import AttentionStep
from rillgate_server.worker.collectives import Collectives
from rillgate_server.worker.network.base import join_logits

ATTENTION_NAME = "rillgate_paged"
_STEP_ARGUMENT = "rillgate_step"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: None,
    **arguments: Any,  # transformers' own, which differ from model to model
) -> tuple[Tensor, None]:
    """Attend as transformers' interface wants it; [1, heads, tokens, dim] in, tokens first out."""
    step: AttentionStep = arguments[_STEP_ARGUMENT]
    layer_index = module.layer_idx
    assert isinstance(layer_index, int)
    output = step.attend(layer_index, query[0], key[0], value[0], arguments["scaling"])
    return output[None], None


def _no_mask(*_positional: object, **_arguments: object) -> None:
    """Make no mask: the step's metadata says who sees whom."""


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


class TransformersNetwork:
    """A network of transformers' modules (Network)."""

    def __init__(self, model: PreTrainedModel, collectives: Collectives | None = None) -> None:
        """Take a filled model that was built with ATTENTION_NAME; `collectives` of a split one,
        whose layers are connected already."""
        self.model = model
        self._decoder = model.get_decoder()
        self._collectives = collectives

    @property
    def num_heads(self) -> int:
        """See Network."""
        ranks = 1 if self._collectives is None else self._collectives.ranks
        return int(self.model.config.num_attention_heads) // ranks

    @property
    def is_capturable(self) -> bool:
        """See Network; what modules do that we have not read, nobody knows."""
        return False

    @property
    def is_split(self) -> bool:
        """See Network."""
        return self._collectives is not None

    def hidden(self, tokens: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        """Run all layers over a packed step (Network.hidden)."""
        output = self._decoder(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            **{_STEP_ARGUMENT: step},
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Apply the output head (Network.logits)."""
        head = self.model.get_output_embeddings()  # looked up late: layers may be replaced
        logits: Tensor = head(hidden)
        return join_logits(logits, self.model.config.vocab_size, self._collectives)


def layer_cache_shapes(
    config: PreTrainedConfig, ranks: int = 1
) -> tuple[tuple[tuple[int, ...], tuple[int, ...], int | None], ...]:
    """Return per layer (key shape per token, value shape per token, window), for KVLayout.build.

    Of one of `ranks`, which all keep equally many heads.
    """
    if config.model_type == "deepseek_v3":
        heads = config.num_attention_heads // ranks
        key = (heads, config.qk_nope_head_dim + config.qk_rope_head_dim)
        value = (heads, config.v_head_dim)
    else:
        dim = getattr(config, "head_dim", None)
        dim = dim or config.hidden_size // config.num_attention_heads
        key = value = (max(1, config.num_key_value_heads // ranks), dim)
    return tuple((key, value, _window(config, i)) for i in range(config.num_hidden_layers))


def _window(config: PreTrainedConfig, layer_index: int) -> int | None:
    """Return how many tokens a layer sees, itself included; None = all.

    As the architecture's own code has it: a `sliding_window` in a Llama's config means nothing.
    """
    window: int | None = getattr(config, "sliding_window", None)
    if config.model_type == "mistral":
        return window
    if config.model_type in ("qwen2", "qwen3"):
        return window if config.layer_types[layer_index] == "sliding_attention" else None
    return None


def rotary_modules(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """List (parent, attribute, module) of what computes its buffers instead of loading them."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if child._non_persistent_buffers_set
    ]
