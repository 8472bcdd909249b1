"""What a network will hold, and how, before any of it is read.

Owns which layers are quantised, the names and shapes that files have for them, and how many bytes
all of it takes. A mixture's experts, which transformers' modules stack, are layers of their own
here once any of a stack is quantised. Does not know files, nor how a weight is quantised.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rillgate_server.core.checkpoint import TensorEntry
from rillgate_server.core.model_spec import NO_QUANTIZATION
from rillgate_server.core.quantization import BNB_NF4, EMBEDDINGS, HEAD, INT8, Quantization
from rillgate_server.errors import ConfigError
from rillgate_server.worker.sharding import Sharding, TensorSplit


class Form(Enum):
    """What becomes of a tensor that was read."""

    PLAIN = auto()
    """It stays as it is."""
    TO_QUANTIZE = auto()
    """A layer's weight, which is quantised."""
    QUANTIZED = auto()
    """A layer's weight, which the files hold in INT8."""
    SCALES = auto()
    """Of such a weight: [out_features, 1]."""


SCALES_SUFFIX = ".weight_scale"
EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj")
_SCALE_BYTES = 4  # float32
_NF4_BLOCK = 64  # weights that share a scale


def quantised_bytes(method: str, shape: tuple[int, ...]) -> int:
    """Return what a weight [out_features, in_features] takes with its scales."""
    num_weights = math.prod(shape)
    if method == BNB_NF4:
        return -(-num_weights // 2) + _SCALE_BYTES * -(-num_weights // _NF4_BLOCK)
    return num_weights + _SCALE_BYTES * shape[0]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor that files must hold, in whole or as a stack's part."""

    shape: tuple[int, ...]
    """Of the whole."""
    dtype: torch.dtype
    """In which it is held, or handed to be quantised."""
    split: TensorSplit | None
    form: Form = Form.PLAIN
    method: str = INT8
    """Of what is quantised."""

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Of this rank's part."""
        return self.shape if self.split is None else self.split.local_shape(self.shape)

    @property
    def num_bytes(self) -> int:
        """That it takes once it is loaded."""
        shape = self.own_shape
        if self.form is Form.PLAIN:
            return math.prod(shape) * self.dtype.itemsize
        # A layer's scales are counted with its weight.
        return 0 if self.form is Form.SCALES else quantised_bytes(self.method, shape)

    @property
    def staged_bytes(self) -> int:
        """Beside that, while it becomes a layer."""
        is_staged = self.form in (Form.TO_QUANTIZE, Form.QUANTIZED)
        return math.prod(self.own_shape) * self.dtype.itemsize if is_staged else 0


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """All of it."""

    tensors: dict[str, PlannedTensor]
    """By name: the network's own, but `PREFIX.experts.3.up_proj.weight` of experts that are
    layers."""
    experts: tuple[str, ...] = ()
    """Modules whose experts are layers."""

    @property
    def num_bytes(self) -> int:
        """That it takes once it is loaded."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def staged_bytes(self) -> int:
        """Beside that, while the largest weight becomes a layer."""
        return max((tensor.staged_bytes for tensor in self.tensors.values()), default=0)


def plan_weights(
    model: PreTrainedModel,
    dtype: torch.dtype,
    quantization: Quantization,
    sharding: Sharding | None,
    stored: Collection[str],
) -> WeightPlan:
    """Say what a network on the meta device will hold, of one rank's part with `sharding`.

    `stored`: the layers that files hold quantised (`stored_layers`). Raises ConfigError for a
    pattern of `quantization` that no layer matches.
    """
    layers = _quantised_layers(model, quantization)
    is_int8 = quantization.is_stored and quantization.method == INT8
    if quantization.is_stored:
        layers &= set(stored)
    stacks = {
        name: module
        for name, module in model.named_modules()
        if is_experts(module) and any(layer.startswith(f"{name}.") for layer in layers)
    }
    tensors: dict[str, PlannedTensor] = {}

    def add_layer(name: str, shape: tuple[int, ...], split: TensorSplit | None) -> None:
        if not is_int8:
            # What stands for a stored weight gives its own values back in float32 alone.
            read_in = torch.float32 if quantization.is_stored else dtype
            weight = PlannedTensor(shape, read_in, split, Form.TO_QUANTIZE, quantization.method)
            tensors[f"{name}.weight"] = weight
            return
        tensors[f"{name}.weight"] = PlannedTensor(shape, torch.int8, split, Form.QUANTIZED)
        of_rows = split if split is not None and split.dim == 0 else None
        scales = PlannedTensor((shape[0], 1), torch.float32, of_rows, Form.SCALES)
        tensors[f"{name}{SCALES_SUFFIX}"] = scales

    for name, tensor in _loaded_tensors(model).items():
        shape, module = tuple(tensor.shape), name.rpartition(".")[0]
        split = sharding.split_of(name, shape) if sharding else None
        if module in stacks:
            own_split = _split_in_stack(split)
            for expert, own_shape in _expert_layers(name, shape).items():
                if expert in layers:
                    add_layer(expert, own_shape, own_split)
                else:
                    tensors[f"{expert}.weight"] = PlannedTensor(own_shape, dtype, own_split)
        elif name == f"{module}.weight" and module in layers:
            add_layer(module, shape, split)
        else:
            tensors[name] = PlannedTensor(shape, _target_dtype(model, name, dtype), split)
    return WeightPlan(tensors, tuple(stacks))


def is_experts(module: nn.Module) -> TypeGuard[nn.Module]:
    """Whether a module is a mixture's stacked experts: gate_up_proj [experts, 2 * intermediate,
    hidden] and down_proj [experts, hidden, intermediate]."""
    stacked = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return all(isinstance(it, nn.Parameter) and it.dim() == 3 for it in stacked)


def embedding_name(model: PreTrainedModel) -> str:
    """Return the name of the module that looks tokens up."""
    return _name_of(model, model.get_input_embeddings())


def head_name(model: PreTrainedModel) -> str:
    """Return the name of the output head's module."""
    return _name_of(model, model.get_output_embeddings())


def _name_of(model: PreTrainedModel, wanted: nn.Module) -> str:
    names: Iterator[str] = (name for name, it in model.named_modules() if it is wanted)
    return next(names)


def _quantised_layers(model: PreTrainedModel, quantization: Quantization) -> set[str]:
    """Name the layers that are quantised; of a tied head and embedding, the embedding alone."""
    if quantization.method == NO_QUANTIZATION:
        return set()
    head = model.get_output_embeddings()
    found: set[str] = set()
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head:
            found.add(name)
        if is_experts(module):
            for parameter, tensor in module.named_parameters(recurse=False):
                found.update(_expert_layers(f"{name}.{parameter}", tuple(tensor.shape)))
    is_tied = model.config.tie_word_embeddings
    include = (EMBEDDINGS, HEAD) if quantization.is_stored else quantization.include
    if EMBEDDINGS in include or (is_tied and HEAD in include):
        found.add(embedding_name(model))
    if HEAD in include and not is_tied:
        found.add(head_name(model))
    _check_patterns(quantization, found)
    return {name for name in found if not quantization.excludes(name)}


def stored_layers(entries: Mapping[str, TensorEntry]) -> set[str]:
    """Name the layers that files hold quantised: their weights are no floating-point numbers."""
    return {
        name.removesuffix(".weight")
        for name, entry in entries.items()
        if name.endswith(".weight") and entry.dtype in ("int8", "uint8")
    }


def _check_patterns(quantization: Quantization, layers: set[str]) -> None:
    """Raise ConfigError for a pattern that matches none of the layers."""
    for pattern in quantization.exclude:
        if not any(Quantization(exclude=(pattern,)).excludes(layer) for layer in layers):
            raise ConfigError(
                f"model.quantization_exclude has {pattern!r}, which matches none of the "
                f"{len(layers)} layers that would be quantised; allowed: patterns of names such as "
                f"{min(layers)}"
            )


def _expert_layers(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Map the layers that lie in a stacked tensor to their weights' shapes."""
    prefix, _, kind = name.rpartition(".")
    num_experts, num_rows, num_columns = shape
    if kind == "down_proj":
        return {f"{prefix}.{i}.{kind}": (num_rows, num_columns) for i in range(num_experts)}
    return {
        f"{prefix}.{i}.{half}": (num_rows // 2, num_columns)
        for i in range(num_experts)
        for half in ("gate_proj", "up_proj")
    }


def _split_in_stack(split: TensorSplit | None) -> TensorSplit | None:
    """Return a stacked tensor's split as that of one layer in it."""
    if split is None:
        return None
    return TensorSplit(split.dim - 1, split.first, split.last, split.length)


def _loaded_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Map name -> meta tensor of everything that a checkpoint must hold."""
    computed = {
        f"{module_name}.{buffer}" if module_name else buffer
        for module_name, module in model.named_modules()
        for buffer in module._non_persistent_buffers_set
    }
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update((n, b) for n, b in model.named_buffers() if n not in computed)
    if model.config.tie_word_embeddings:
        found.pop(f"{head_name(model)}.weight", None)
    return found


def _target_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """Keep in float32 what the architecture wants so (DeepSeek-V3's routing bias)."""
    keep = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return torch.float32 if any(part in name for part in keep) else dtype
