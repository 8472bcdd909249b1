"""How many bytes weights take, counted tensor by tensor."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rillgate_server.worker.model_loader import load_network
from rillgate_server.worker.quantization.int8 import Int8Linear
from rillgate_server.worker.weight_bytes import measure_weights

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 64, 96, 3, 211
LAYER_WEIGHTS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * 32 + 3 * HIDDEN * INTERMEDIATE)
LAYER_CHANNELS = LAYERS * (HIDDEN + 32 + 32 + HIDDEN + INTERMEDIATE + INTERMEDIATE + HIDDEN)


class _Carried:
    """What bitsandbytes hangs on a weight: a state with tensors, and a state of its own in it."""

    def __init__(self, absmax: Tensor, state2: "_Carried | None" = None) -> None:
        self.absmax = absmax
        self.state2 = state2


def test_bf16_layers_take_what_they_take_in_bf16(checkpoint: Callable[[str], Path]) -> None:
    """And the whole model is the sum of its tensors, one that is tied counted once."""
    plain = measure_weights(load_network(checkpoint("llama"), torch.bfloat16))
    assert plain.num_layer_weights == LAYER_WEIGHTS
    assert plain.layers == plain.layers_in_bf16 == 2 * LAYER_WEIGHTS
    assert plain.bits_per_weight == 16
    tied = measure_weights(load_network(checkpoint("llama-tied"), torch.bfloat16))
    assert plain.model - tied.model == 2 * VOCAB * HIDDEN
    whole = measure_weights(load_network(checkpoint("llama"), torch.float32))
    assert whole.fraction_of_bf16 == 2


def test_int8_layers_take_a_byte_a_weight_and_a_scale_a_channel(
    checkpoint: Callable[[str], Path],
) -> None:
    """The head is none of them."""
    network = load_network(checkpoint("llama"), torch.bfloat16)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            network.set_submodule(name, Int8Linear(module.weight.detach(), None))
    weights = measure_weights(network)
    assert weights.layers == LAYER_WEIGHTS + 4 * LAYER_CHANNELS
    assert weights.layers_in_bf16 == 2 * LAYER_WEIGHTS


def test_what_a_weight_carries_is_counted(checkpoint: Callable[[str], Path]) -> None:
    """States of a quantisation hang on the weight itself, one inside another."""
    network = load_network(checkpoint("llama"), torch.bfloat16)
    before = measure_weights(network)
    layer = network.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, nn.Linear)
    layer.weight.quant_state = _Carried(torch.zeros(10), _Carried(torch.zeros(3)))  # type: ignore[attr-defined]
    assert measure_weights(network).layers == before.layers + 52
