"""From a checkpoint's files to a filled network.

Owns where each tensor of it is, and that memory suffices. The network is built without memory (on
torch's meta device); then each tensor is read straight into its place (worker.weight_places), so
the peak is the weights plus one tensor. Does not know which layers are quantised
(worker.weight_plan does), the cache, plans, or how the network is called; nor how a model is split
(worker.sharding does): of a split one, each rank reads only its own slices, and has memory for
nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rillgate_server.core.checkpoint import TensorEntry, read_config, read_tensor_entries
from rillgate_server.core.quantization import AS_THEY_ARE, Quantization, resolve_quantization
from rillgate_server.errors import CheckpointError, OutOfMemory
from rillgate_server.worker.compute_device import CPU
from rillgate_server.worker.host_memory import available_bytes
from rillgate_server.worker.network.transformers_network import ATTENTION_NAME, rotary_modules
from rillgate_server.worker.quantization.embedding import Int8Embedding
from rillgate_server.worker.quantization.experts import QuantizedExperts
from rillgate_server.worker.quantization.int8 import Int8Linear
from rillgate_server.worker.sharding import Sharding, TensorSplit
from rillgate_server.worker.weight_places import Progress, Target, fill_places, place_all
from rillgate_server.worker.weight_plan import (
    EXPERT_LAYERS,
    SCALES_SUFFIX,
    Form,
    WeightPlan,
    embedding_name,
    plan_weights,
    stored_layers,
)

_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies follow the longest sequence of a batch: a neighbour
would change one's tokens, and cached keys would not fit new ones."""

QuantizeLinear = Callable[[Tensor, Tensor | None], nn.Module]
"""From a weight [out_features, in_features], and of one that is cut through its channels the whole
ones, [out_features, more], as files hold them, to a layer without its bias. Neither is kept."""

RestoreLinear = Callable[[Tensor, Tensor], nn.Module]
"""From a weight in INT8 and its scales, [out_features], float32, neither of which is kept."""


class StoredWeights(Protocol):
    """A checkpoint's weights that stand for plain ones."""

    def plain_entries(self) -> dict[str, TensorEntry]:
        """Return the files' tensors as if these were plain."""
        ...

    def read(self, name: str) -> Tensor | None:
        """Return what one stands for, float32; None: it is none of these."""
        ...

    def check_split(self, name: str, split: TensorSplit | None) -> None:
        """Raise CheckpointError for a split that it cannot have."""
        ...


OpenStored = Callable[[Path, dict[str, TensorEntry]], StoredWeights]


@dataclass(frozen=True, slots=True)
class WeightStore:
    """Where weights go, and how they are held there."""

    device: torch.device
    free_bytes: int
    """That they may take."""
    quantize: QuantizeLinear | None = None
    """Makes the layers that `quantization` is for; None: all stay as they are."""
    restore: RestoreLinear | None = None
    """The same from weights that files hold in INT8."""
    quantization: Quantization = AS_THEY_ARE
    open_stored: OpenStored | None = None
    """Reads what files hold quantised in other ways."""


class _Assembly:
    """A network that is being filled.

    State: `targets`, what each tensor of it is filled into, and the layers quantised so far.
    """

    def __init__(self, model: PreTrainedModel, plan: WeightPlan, store: WeightStore) -> None:
        """Begin with a network on the meta device."""
        self.targets: dict[str, Target] = {}
        self._model = model
        self._plan = plan
        self._store = store
        self._layers: dict[str, nn.Module] = {}  # name -> quantised

    def reserve(self, what: str) -> None:
        """Make the targets; raises OutOfMemory about `what` before any is made."""
        if self._plan.num_bytes > self._store.free_bytes:
            raise OutOfMemory(f"loading {what}", self._plan.num_bytes, self._store.free_bytes)
        device = self._store.device
        # Each layer's weight is read into this, and made a layer before the next one is read.
        shared = torch.empty(self._plan.staged_bytes, dtype=torch.uint8, device=device)
        for name, planned in self._plan.tensors.items():
            shape = planned.own_shape
            if planned.staged_bytes:
                tensor = shared[: planned.staged_bytes].view(planned.dtype).view(shape)
            else:
                tensor = torch.empty(shape, dtype=planned.dtype, device=device)
            self.targets[name] = Target(planned.shape, tensor, planned.split)

    def take_filled(self, name: str, stored: Tensor | None = None) -> None:
        """Take a target that has all that files have for it.

        stored: of the file's tensor that came last, the rows that the target has, in whole; None:
        the target was not filled from files, and no padding is missing.
        """
        target = self.targets[name]
        if stored is not None and target.num_elements < target.own.numel():
            assert target.split is not None
            target.own[target.split.last - target.split.first :].zero_()
        layer, form = name.removesuffix(".weight"), self._plan.tensors[name].form
        if form is Form.TO_QUANTIZE:
            assert self._store.quantize is not None
            is_cut = target.split is not None and target.split.dim == 1
            self._layers[layer] = self._store.quantize(target.own, stored if is_cut else None)
        elif form is Form.QUANTIZED:
            assert self._store.restore is not None
            scales = self.targets[f"{layer}{SCALES_SUFFIX}"].own  # read before any weight
            self._layers[layer] = self._store.restore(target.own, scales.flatten())

    def finish(self, sharding: Sharding | None) -> None:
        """Put everything into the network."""
        model = self._model
        for prefix in self._plan.experts:
            self._put_experts(prefix)
        for name, target in self.targets.items():
            if sharding is not None and sharding.is_added_by_another(name):
                target.own.zero_()
            is_expert = name.startswith(tuple(f"{it}." for it in self._plan.experts))
            if self._plan.tensors[name].form is Form.PLAIN and not is_expert:
                _set_tensor(model, name, target.own)
        for name, layer in self._layers.items():
            bias = self.targets.get(f"{name}.bias")
            if bias is not None:
                layer.bias = nn.Parameter(bias.own.float(), requires_grad=False)
            self._put_layer(name, layer)
        if model.config.tie_word_embeddings and embedding_name(model) not in self._layers:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        with self._store.device:
            _rebuild_rotary(model)

    def _put_layer(self, name: str, layer: nn.Module) -> None:
        """Put a quantised layer in place of the module of that name; a tied embedding's is the
        head's, too."""
        model = self._model
        if name != embedding_name(model):
            model.set_submodule(name, layer)
            return
        assert isinstance(layer, Int8Linear)
        model.set_input_embeddings(Int8Embedding(layer, model.dtype))
        if model.config.tie_word_embeddings:
            model.set_output_embeddings(layer)

    def _put_experts(self, prefix: str) -> None:
        """Put the layers of a mixture's experts in place of the stacks."""
        experts = self._model.get_submodule(prefix)
        gates, ups, downs = (
            [self._take_expert(f"{prefix}.{i}.{kind}") for i in range(len(experts.down_proj))]
            for kind in EXPERT_LAYERS
        )
        layers = QuantizedExperts(gates, ups, downs, experts.act_fn)
        self._model.set_submodule(prefix, layers)

    def _take_expert(self, name: str) -> nn.Module:
        """Return one of an expert's layers, quantised or as it is."""
        if name in self._layers:
            return self._layers.pop(name)
        weight = self.targets[f"{name}.weight"].own
        num_rows, num_columns = weight.shape
        layer = nn.Linear(num_columns, num_rows, bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer


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
    by name), ConfigError (a pattern that matches no layer) or OutOfMemory, before any weight is
    read where that is possible.
    """
    entries = read_tensor_entries(model_dir)
    model = empty_network(model_dir, dtype)
    store = store or WeightStore(CPU, available_bytes())
    plan = plan_weights(model, dtype, store.quantization, sharding, stored_layers(entries))
    stored = store.open_stored(model_dir, entries) if store.open_stored is not None else None
    if stored is not None:
        entries = stored.plain_entries()
        for name, planned in plan.tensors.items():
            stored.check_split(name, planned.split)
    assembly = _Assembly(model, plan, store)
    assembly.reserve(str(model_dir))
    places = place_all(model, entries, assembly.targets)
    scales = tuple(name for name in places if name.endswith(SCALES_SUFFIX))
    read = None if stored is None else stored.read
    fill_places(places, entries, on_progress, assembly.take_filled, first=scales, read=read)
    assembly.finish(sharding)
    return model.eval()


def random_network(
    model_dir: Path, dtype: torch.dtype, num_layers: int, store: WeightStore
) -> PreTrainedModel:
    """Build a network of a checkpoint's shape with fewer layers and random weights, to measure."""
    model = empty_network(model_dir, dtype, num_layers)
    assembly = _Assembly(model, plan_weights(model, dtype, store.quantization, None, ()), store)
    assembly.reserve(str(model_dir))
    for name, target in assembly.targets.items():
        if target.own.is_floating_point():
            target.own.normal_(0.0, 0.02)
        assembly.take_filled(name)
    assembly.finish(None)
    return model.eval()


def load_config(model_dir: Path) -> PreTrainedConfig:
    """Read config.json as transformers understands it; refuse what we would compute wrongly."""
    read_config(model_dir)  # says more precisely what is wrong with the file
    resolve_quantization(AS_THEY_ARE, model_dir)
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


def empty_network(
    model_dir: Path, dtype: torch.dtype, max_layers: int | None = None
) -> PreTrainedModel:
    """Build the modules without memory for weights; of at most `max_layers` layers."""
    config = load_config(model_dir)
    if max_layers is not None:
        config.num_hidden_layers = min(max_layers, config.num_hidden_layers)
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
