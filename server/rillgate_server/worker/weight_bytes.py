"""How much memory a network's weights take, and how much its linear layers would take in bf16.

Measured on the tensors of a loaded network: INT8 layers with the padding of the kernels (channels
up to a multiple of 64), others before they are packed, and a tied head's packed copy beside its
embedding not at all. Does not know how a layer is quantised: whatever tensors a linear layer keeps,
in whatever attribute, are its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

_BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Of one process's part of a model."""

    layers: int
    """Of the linear layers but the output head, scales and biases included: what a quantisation
    changes."""
    layers_in_bf16: int
    """What the same layers take in bfloat16."""
    num_layer_weights: int
    """Elements of their matrices."""
    model: int
    """Of everything; a tensor that two modules share counts once."""

    @property
    def bits_per_weight(self) -> float:
        """Of the linear layers, scales and biases included."""
        return 8 * self.layers / self.num_layer_weights

    @property
    def fraction_of_bf16(self) -> float:
        """Of the linear layers."""
        return self.layers / self.layers_in_bf16


def measure_weights(model: PreTrainedModel) -> WeightBytes:
    """Measure a filled network."""
    head = model.get_output_embeddings()
    layers = [it for it in model.modules() if _is_linear(it) and it is not head]
    num_weights = sum(layer.in_features * layer.out_features for layer in layers)
    num_biases = sum(layer.out_features for layer in layers if layer.bias is not None)
    return WeightBytes(
        layers=_num_bytes(layers),
        layers_in_bf16=_BF16_BYTES * (num_weights + num_biases),
        num_layer_weights=num_weights,
        model=_num_bytes([model]),
    )


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _num_bytes(modules: list[nn.Module]) -> int:
    """Sum over the distinct tensors that modules, and those inside them, keep."""
    found = {
        (tensor.data_ptr(), tensor.nbytes): tensor.nbytes
        for module in modules
        for inner in module.modules()
        for tensor in _tensors(inner)
    }
    return sum(found.values())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield what a module itself keeps; a tensor may carry others (a quantisation's state)."""
    kept = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    for value in kept:
        if isinstance(value, Tensor):
            yield value
            yield from _carried(vars(value), depth=3)


def _carried(attributes: dict[str, object], depth: int) -> Iterator[Tensor]:
    """Yield the tensors that a tensor's attributes hold, and the attributes of those."""
    for value in attributes.values():
        if isinstance(value, Tensor):
            yield value
        elif depth and hasattr(value, "__dict__"):
            yield from _carried(vars(value), depth - 1)
