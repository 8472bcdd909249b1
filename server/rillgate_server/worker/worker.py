"""The data plane's front door: load a checkpoint, reserve the cache, execute plans.

Owns the choice of types and threads. Does not know requests; sees block numbers and slots.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from rillgate_server.core.checkpoint import read_model_spec
from rillgate_server.core.model_spec import NO_QUANTIZATION, FreeMemory, KVLayout, ModelSpec
from rillgate_server.core.quantization import Quantization, resolve_quantization
from rillgate_server.core.step import StepLimits, StepPlan, StepResult
from rillgate_server.core.step_codec import SampledTokens
from rillgate_server.errors import ConfigError, EngineFailure
from rillgate_server.worker.allocator import keep_freed_memory, return_freed_memory
from rillgate_server.worker.attention.base import AttentionBackend
from rillgate_server.worker.attention.choice import make_attention, triton_works
from rillgate_server.worker.collectives import Collectives
from rillgate_server.worker.compute_device import CPU, FindFreeMemory, free_bytes, use_device
from rillgate_server.worker.draft_model import DraftModel, DraftSize, check_draft_model
from rillgate_server.worker.kernels.library import Kernels, load_kernels
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.kv_tiers import reserve_tiers
from rillgate_server.worker.kv_transfer import BlockCopier, KVTransfer
from rillgate_server.worker.model_loader import WeightStore, load_config, load_network
from rillgate_server.worker.model_runner import ModelRunner
from rillgate_server.worker.network.base import Network
from rillgate_server.worker.network.dense_decoder import DenseDecoder, can_compute
from rillgate_server.worker.network.transformers_network import (
    TransformersNetwork,
    layer_cache_shapes,
)
from rillgate_server.worker.packed_linear import pack_linear_layers
from rillgate_server.worker.quantization.int8 import pack_int8_layers
from rillgate_server.worker.quantization.methods import with_layers
from rillgate_server.worker.rank_group import RankGroup
from rillgate_server.worker.runner import PipelinedRunner, Runner
from rillgate_server.worker.sharding import (
    Sharding,
    check_split,
    connect_embedding,
    connect_layers,
)
from rillgate_server.worker.weight_bytes import WeightBytes, measure_weights

_log = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""What CPUs and GPUs compute well; CPUs not in float16."""
MAX_PLANS_IN_FLIGHT = 2
"""Of a whole model on a GPU: one that runs, and the next."""
_INSTEAD = {"float16": "bfloat16", "float64": "float32"}
"""What `auto` takes for a checkpoint in a type that CPUs compute slowly: the same memory."""
_INSTEAD_ON_GPUS = {"float64": "float32"}


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What decides how a checkpoint is loaded."""

    dtype: str = "auto"
    """`auto` (the checkpoint's; on a CPU bfloat16 for float16), or a type's name."""
    num_threads: int | None = None
    """Threads for tensor work; None: torch's default, one per core."""
    block_size_tokens: int = 16
    """Tokens per cache block."""
    kv_dtype: str = "auto"
    """Of cached keys and values: `auto` (that of the computation) or `int8`."""
    device: torch.device = CPU
    """Where the network computes and its cache is."""
    quantization: str = NO_QUANTIZATION
    """Of the decoder's linear layers: a value of model.quantization."""
    quantization_exclude: tuple[str, ...] = ()
    """Patterns of the names of layers that stay as they are."""
    quantization_include: tuple[str, ...] = ()
    """What is quantised beside them: `embeddings`, `head`."""
    bnb_int8_threshold: float = 6.0
    """Activations beyond it are outliers of bnb-int8."""

    @property
    def weights(self) -> Quantization:
        """How they are held."""
        return Quantization(
            self.quantization,
            self.quantization_exclude,
            self.quantization_include,
            self.bnb_int8_threshold,
        )


class Worker:
    """A model, or one rank of a split one. Called from one thread at a time.

    State: the network, and from `allocate_cache` on the runner with its cache and slots.
    """

    def __init__(
        self,
        network: Network,
        spec: ModelSpec,
        layout: KVLayout,
        device: torch.device,
        weights: WeightBytes,
    ) -> None:
        """Use `load`."""
        self.device = device
        self.spec = spec
        self.layout = layout
        self.network = network
        self.weights = weights
        self.num_pageable_host_blocks = 0
        """Of the host tier, where a GPU copies from it and its memory could not be pinned."""
        self.uses_triton = False
        """Whether Triton's kernels compute, on a GPU."""
        self._runner: Runner | None = None
        self._draft: Worker | None = None

    def __repr__(self) -> str:
        """Show model and state."""
        return f"Worker({self.spec.name}, {self.spec.dtype}, {self._runner})"

    @classmethod
    def load(
        cls,
        model_dir: Path,
        options: WorkerOptions,
        on_progress: Callable[[int, int], None] | None = None,
        group: RankGroup | None = None,
    ) -> "Worker":
        """Load a checkpoint, or a rank's part of it; `on_progress` gets (bytes done, bytes in all).

        Raises CheckpointError, OutOfMemory, or ConfigError for an unknown dtype or a split that
        does not divide.
        """
        use_device(options.device)
        return_freed_memory()
        weights = resolve_quantization(options.weights, model_dir)
        spec = read_model_spec(model_dir).with_quantization(weights.version)
        dtype = resolve_dtype(options.dtype, spec.dtype, options.device.type)
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)
        kernels = load_kernels() if options.device == CPU else None
        uses_triton = triton_works(options.device)
        store = WeightStore(options.device, free_bytes(options.device))
        store = with_layers(store, weights, kernels)
        sharding, collectives, ranks = None, None, 1
        if group is not None:
            collectives, ranks = group.collectives, group.place.ranks
            sharding = Sharding(load_config(model_dir), group.place.rank, ranks)
            if store.device == CPU:  # which all ranks of the machine share
                store = replace(store, free_bytes=store.free_bytes // group.num_local)
        model = load_network(model_dir, _DTYPES[dtype], on_progress, sharding, store)
        weight_bytes = measure_weights(model)
        if collectives is not None:
            connect_embedding(model, collectives)
        split = None if sharding is None or collectives is None else (sharding, collectives)
        network = choose_network(model, kernels, split, uses_triton=uses_triton)
        keep_freed_memory()
        shapes = layer_cache_shapes(model.config, ranks)
        kv_dtype = dtype if options.kv_dtype == "auto" else options.kv_dtype
        layout = KVLayout.build(options.block_size_tokens, kv_dtype, shapes)
        worker = cls(network, replace(spec, dtype=dtype), layout, options.device, weight_bytes)
        worker.uses_triton = uses_triton
        return worker

    @property
    def draft_block_bytes(self) -> int:
        """What the draft model's cache keeps beside each block of the device tier."""
        return 0 if self._draft is None else self._draft.layout.block_bytes

    def use_draft_model(self, draft: "Worker") -> None:
        """Let a worker's model make proposals, from the next `allocate_cache` on; see
        `check_draft_model`."""
        check_draft_model(draft.spec, self.spec)
        self._draft = draft

    @property
    def max_plans_in_flight(self) -> int:
        """How many plans `begin` takes before the first must be finished."""
        is_pipelined = self.uses_triton and not self.network.is_split
        return MAX_PLANS_IN_FLIGHT if is_pipelined else 1

    def spare_memory(self, find_free_memory: FindFreeMemory, limits: StepLimits) -> FreeMemory:
        """Return what the cache may take: what is free, on a GPU less what the largest step takes.

        All ranks of a split model must call it together: they compute such a step.
        """
        if not self.uses_triton:
            return find_free_memory()
        use_device(self.device)
        measure = import_module("rillgate_server.worker.gpu.step_memory").measure_step_bytes
        block_size = self.layout.block_size_tokens
        step_bytes = measure(self.network, self._small_attention, block_size, self.spec, limits)
        free = find_free_memory()
        left_bytes = max(0, free.device_bytes - step_bytes)
        return replace(free, device_bytes=left_bytes, is_measured=True)

    def allocate_cache(
        self,
        num_device_blocks: int,
        num_host_blocks: int = 0,
        audit: bool = False,
        limits: StepLimits | None = None,
    ) -> None:
        """Reserve both tiers; slots and blocks of earlier ones are gone. Raises OutOfMemory.

        `audit`: checksum blocks on their way to the host tier (plans say what must come back).
        `limits`: what steps may hold; a GPU's decode steps are captured for them.
        """
        use_device(self.device)
        self.close()  # its memory counts as free for the new one
        tiers = reserve_tiers(self.layout, num_device_blocks, num_host_blocks, self.device)
        self.num_pageable_host_blocks = tiers.host.num_pageable_blocks
        transfer = KVTransfer(tiers, audit=audit)
        attention = self._attention_over(tiers.device)
        draft, vocab_size = self._draft_model(tiers), self.spec.vocab_size
        if self.uses_triton:
            make = import_module("rillgate_server.worker.gpu.assembly").make_device_runner
            self._runner = make(self.network, attention, transfer, vocab_size, limits, draft)
        else:
            self._runner = ModelRunner(
                self.network, attention, tiers.device, transfer, vocab_size, draft
            )

    def _small_attention(self, num_blocks: int) -> AttentionBackend:
        return self._attention_over(KVStorage(self.layout, num_blocks, device=self.device))

    def _attention_over(self, storage: KVStorage) -> AttentionBackend:
        dtype = _DTYPES[self.spec.dtype]
        heads = self.network.num_heads if self.uses_triton else None
        return make_attention(storage, dtype, heads)

    def _draft_model(self, tiers: BlockCopier) -> DraftModel | None:
        draft, storage = self._draft, tiers.device
        if draft is None:
            return None
        # The pages of the tiers may not be there yet, and count as free.
        taken_bytes = storage.num_bytes + tiers.host.num_bytes if self.device == CPU else 0
        own = KVStorage(
            draft.layout, storage.num_blocks, device=self.device, taken_bytes=taken_bytes
        )
        size = DraftSize.of(draft.spec, self.spec)
        return DraftModel(draft.network, draft._attention_over(own), own, size)

    def close(self) -> None:
        """Give the cache up and end its copies."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def note_sampled(self, sampled: SampledTokens) -> None:
        """Note tokens that rank 0 sampled after the last plan; on the other ranks."""
        if self._runner is not None:
            self._runner.note_sampled(sampled)

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one plan. Raises EngineFailure for one that contradicts what went before."""
        return self._ready_runner().execute(plan)

    def begin(self, plan: StepPlan) -> None:
        """Hand one plan to the GPU; see PipelinedExecutor. Where max_plans_in_flight is over 1."""
        self._device_runner().begin(plan)

    def finish(self) -> StepResult:
        """Wait for the plan that was begun first."""
        return self._device_runner().finish()

    def _ready_runner(self) -> Runner:
        if self._runner is None:
            raise EngineFailure("a plan came before allocate_cache")
        use_device(self.device)
        return self._runner

    def _device_runner(self) -> PipelinedRunner:
        runner = self._ready_runner()
        assert self.uses_triton, runner
        return cast(PipelinedRunner, runner)


def choose_network(
    model: PreTrainedModel,
    kernels: Kernels | None,
    split: tuple[Sharding, Collectives] | None = None,
    *,
    uses_triton: bool = False,
) -> Network:
    """Take the fused layers for a filled model where they are there and can, transformers' else.

    `kernels` are C++'s, for CPUs; `uses_triton`: Triton works, on a GPU.
    """
    collectives = None if split is None else split[1]
    if uses_triton:
        module = import_module("rillgate_server.worker.network.gpu_decoder")
        if module.can_compute(model, model.device):
            network: Network = module.GpuDecoder(model, collectives)
            return network
    if kernels is not None and can_compute(model):
        return DenseDecoder(model, kernels, collectives)
    pack_linear_layers(model)
    pack_int8_layers(model)
    if split is not None:
        connect_layers(model, *split)
    return TransformersNetwork(model, collectives)


def check_ranks(model_dir: Path, ranks: int) -> None:
    """Raise ConfigError unless the checkpoint can be split so; reads no weights."""
    check_split(load_config(model_dir), ranks)


def resolve_dtype(asked: str, checkpoint: str, device_type: str = "cpu") -> str:
    """Return the type to compute in."""
    instead = _INSTEAD if device_type == "cpu" else _INSTEAD_ON_GPUS
    dtype = asked
    if asked == "auto":
        dtype = instead.get(checkpoint, checkpoint)
        if dtype != checkpoint:
            _log.info("the checkpoint is %s; computing in %s", checkpoint, dtype)
    allowed = [name for name in _DTYPES if name not in instead]
    if dtype not in allowed:
        of = f" (from the checkpoint's {checkpoint})" if asked == "auto" else ""
        raise ConfigError(
            f"model.dtype is {dtype}{of}; allowed on a {device_type}: auto, {', '.join(allowed)}"
        )
    return dtype
