"""From a checkpoint's files to a filled network.

Owns in which type each tensor of it is and where, what is quantised, and that memory suffices. The
network is built without memory (on torch's meta device); then each tensor is read straight into its
place (worker.weight_places), so the peak is the weights plus one tensor. Does not know the cache,
plans, or how the network is called; nor how a model is split (worker.sharding does): of a split
one, each rank reads only its own slices, and has memory for nothing else.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rillgate_server.core.checkpoint import read_config, read_tensor_entries
from rillgate_server.errors import CheckpointError, OutOfMemory
from rillgate_server.worker.compute_device import CPU
from rillgate_server.worker.host_memory import available_bytes
from rillgate_server.worker.network.transformers_network import ATTENTION_NAME, rotary_modules
from rillgate_server.worker.sharding import Sharding
from rillgate_server.worker.weight_places import Progress, Target, fill_places, place_all

_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies follow the longest sequence of a batch: a neighbour
would change one's tokens, and cached keys would not fit new ones."""

QuantizeLinear = Callable[[Tensor], nn.Module]
"""From a weight [out_features, in_features], which is not kept, to a layer without its bias."""


@dataclass(frozen=True, slots=True)
class WeightStore:
    """Where weights go, and how they are held there."""

    device: torch.device
    free_bytes: int
    """That they may take."""
    quantize: QuantizeLinear | None = None
    """Makes the linear layers of all but the output head; None: they stay as they are."""


class _Assembly:
    """A network that is being filled.

    State: `targets`, what each tensor of it is filled into, and the layers quantised so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype,
        sharding: Sharding | None,
        store: WeightStore,
    ) -> None:
        """Begin with a network on the meta device."""
        self.targets: dict[str, Target] = {}
        self._model = model
        self._dtype = dtype
        self._sharding = sharding
        self._store = store
        self._quantised = _quantised_weights(model) if store.quantize is not None else set()
        self._layers: dict[str, nn.Module] = {}  # name -> quantised

    def reserve(self, what: str) -> None:
        """Make the targets; raises OutOfMemory about `what` before any is made."""
        shapes = {name: tuple(t.shape) for name, t in _loaded_tensors(self._model).items()}
        if self._model.config.tie_word_embeddings:
            shapes.pop("lm_head.weight", None)
        types = {name: _target_dtype(self._model, name, self._dtype) for name in shapes}
        splits = {
            name: self._sharding.split_of(name, shape) if self._sharding else None
            for name, shape in shapes.items()
        }
        own = {n: s.local_shape(shapes[n]) if s else shapes[n] for n, s in splits.items()}
        needed_bytes = sum(
            math.prod(shape) * (1 if name in self._quantised else types[name].itemsize)
            for name, shape in own.items()
        )
        if needed_bytes > self._store.free_bytes:
            raise OutOfMemory(f"loading {what}", needed_bytes, self._store.free_bytes)

        device = self._store.device
        largest = max((math.prod(own[name]) for name in self._quantised), default=0)
        shared = torch.empty(largest, dtype=self._dtype, device=device)
        for name, shape in own.items():
            if name in self._quantised:
                tensor = shared[: math.prod(shape)].view(shape)
            else:
                tensor = torch.empty(shape, dtype=types[name], device=device)
            self.targets[name] = Target(shapes[name], tensor, splits[name])

    def take_filled(self, name: str) -> None:
        """Take a target that has all that files have for it."""
        target = self.targets[name]
        if target.num_elements < target.own.numel():
            assert target.split is not None
            target.own[target.split.last - target.split.first :].zero_()
        if name in self._quantised:
            assert self._store.quantize is not None
            self._layers[name.removesuffix(".weight")] = self._store.quantize(target.own)

    def finish(self) -> None:
        """Put everything into the network."""
        model = self._model
        for name, target in self.targets.items():
            if self._sharding is not None and self._sharding.is_added_by_another(name):
                target.own.zero_()
            if name not in self._quantised:
                _set_tensor(model, name, target.own)
        for name, layer in self._layers.items():
            bias = self.targets.get(f"{name}.bias")
            if bias is not None:
                layer.bias = nn.Parameter(bias.own.float(), requires_grad=False)
            model.set_submodule(name, layer)
        if model.config.tie_word_embeddings:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        with self._store.device:
            _rebuild_rotary(model)


def load_network(
    model_dir: Path,
    dtype: torch.dtype,
    on_progress: Progress | None = None,
    sharding: Sharding | None = None,
    store: WeightStore | None = None,
) -> PreTrainedModel:
    """Build and fill the network, or one rank's part of it, in `dtype`.

    `store` None: as it is, in the machine's memory. A layer is quantised as soon as its weight has
    been read, into memory that all of them share: the peak is one tensor more. Raises
    CheckpointError (files, architecture, tensors that are missing, unexpected or of another shape,
    by name) or OutOfMemory, before any weight is read where that is possible.
    """
    entries = read_tensor_entries(model_dir)
    model = _empty_network(model_dir, dtype)
    assembly = _Assembly(model, dtype, sharding, store or WeightStore(CPU, available_bytes()))
    assembly.reserve(str(model_dir))
    places = place_all(model, entries, assembly.targets)
    fill_places(places, entries, on_progress, assembly.take_filled)
    assembly.finish()
    return model.eval()


def load_config(model_dir: Path) -> PreTrainedConfig:
    """Read config.json as transformers understands it; refuse what we would compute wrongly."""
    raw = read_config(model_dir)
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise CheckpointError(f"{model_dir} is quantised ({method}); supported: plain weights")
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (StrictDataclassError, ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{model_dir / 'config.json'} is refused: {error}") from error
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _BATCH_DEPENDENT_ROPE:
        raise CheckpointError(
            f"{model_dir} uses rotary embeddings of type {rope['rope_type']!r}, whose frequencies "
            "depend on the longest sequence in a batch; not supported"
        )
    return config


def _empty_network(model_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Build the modules without memory for weights."""
    config = load_config(model_dir)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            # One expert after another: the other implementations copy weights per step on CPUs.
            experts_implementation="eager",
        )
    assert isinstance(model, PreTrainedModel)
    return model


def _loaded_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Map name -> meta tensor of everything that a checkpoint must hold."""
    computed = {
        f"{module_name}.{buffer}" if module_name else buffer
        for module_name, module in model.named_modules()
        for buffer in module._non_persistent_buffers_set
    }
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update((n, b) for n, b in model.named_buffers() if n not in computed)
    return found


def _quantised_weights(model: PreTrainedModel) -> set[str]:
    """Name the weights of the decoder's linear layers; a mixture's stacked experts are none."""
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    }


def _target_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """Keep in float32 what the architecture wants so (DeepSeek-V3's routing bias)."""
    keep = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return torch.float32 if any(part in name for part in keep) else dtype


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a filled tensor in place of a meta one."""
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    if attribute in module._parameters:
        setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
        if isinstance(module, nn.Linear) and attribute == "weight":
            module.out_features, module.in_features = tensor.shape  # less than the config's
    else:
        module._buffers[attribute] = tensor


def _rebuild_rotary(model: PreTrainedModel) -> None:
    """Make the modules that compute their buffers again, now with memory.

    On the meta device their frequencies were never computed; copying shapes would leave garbage.
    """
    for parent, name, module in rotary_modules(model):
        rebuilt = type(module)(config=model.config)
        setattr(parent, name, rebuilt)
    left = [name for name, t in _all_tensors(model) if t.is_meta]
    assert not left, f"still without memory: {left}"


def _all_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
