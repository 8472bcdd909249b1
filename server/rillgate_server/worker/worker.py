"""The data plane's front door: load a checkpoint, reserve the cache, execute plans.

Owns the choice of types and threads. Does not know requests; sees block numbers and slots.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rillgate_server.core.checkpoint import read_model_spec
from rillgate_server.core.model_spec import NO_QUANTIZATION, KVLayout, ModelSpec
from rillgate_server.core.quantization import Quantization, resolve_quantization
from rillgate_server.core.step import StepPlan, StepResult
from rillgate_server.core.step_codec import SampledTokens
from rillgate_server.errors import ConfigError, EngineFailure
from rillgate_server.worker.allocator import keep_freed_memory, return_freed_memory
from rillgate_server.worker.attention.sdpa import SdpaAttention
from rillgate_server.worker.compute_device import CPU, free_bytes
from rillgate_server.worker.kernels.library import load_kernels
from rillgate_server.worker.kv_tiers import reserve_tiers
from rillgate_server.worker.kv_transfer import KVTransfer
from rillgate_server.worker.model_loader import WeightStore, load_config, load_network
from rillgate_server.worker.model_runner import ModelRunner
from rillgate_server.worker.network.base import Network
from rillgate_server.worker.network.dense_decoder import DenseDecoder, can_compute
from rillgate_server.worker.network.transformers_network import (
    TransformersNetwork,
    layer_cache_shapes,
)
from rillgate_server.worker.packed_linear import pack_linear_layers
from rillgate_server.worker.quantization.int8 import Int8Linear, pack_int8_layers
from rillgate_server.worker.rank_group import RankGroup
from rillgate_server.worker.sharding import Sharding, check_split, connect_layers

_log = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""What CPUs and GPUs compute well."""
_INSTEAD = {"float16": "bfloat16", "float64": "float32"}
"""What `auto` takes for a checkpoint in a type that CPUs compute slowly: the same memory."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What decides how a checkpoint is loaded."""

    dtype: str = "auto"
    """`auto` (the checkpoint's; bfloat16 for float16), `bfloat16` or `float32`."""
    num_threads: int | None = None
    """Threads for tensor work; None: torch's default, one per core."""
    block_size_tokens: int = 16
    """Tokens per cache block."""
    kv_dtype: str = "auto"
    """Of cached keys and values: `auto` (that of the computation) or `int8`."""
    device: torch.device = CPU
    """Where the network computes and its cache is."""
    quantization: str = NO_QUANTIZATION
    """Of the decoder's linear layers: `none` or `int8` (worker.quantization)."""
    quantization_exclude: tuple[str, ...] = ()
    """Patterns of the names of layers that stay as they are."""
    quantization_include: tuple[str, ...] = ()
    """What is quantised beside them: `embeddings`, `head`."""

    @property
    def weights(self) -> Quantization:
        """How they are held."""
        return Quantization(self.quantization, self.quantization_exclude, self.quantization_include)


class Worker:
    """A model, or one rank of a split one. Called from one thread at a time.

    State: the network, and from `allocate_cache` on the runner with its cache and slots.
    """

    def __init__(
        self, network: Network, spec: ModelSpec, layout: KVLayout, device: torch.device
    ) -> None:
        """Use `load`."""
        self.device = device
        self.spec = spec
        self.layout = layout
        self.network = network
        self.num_pageable_host_blocks = 0
        """Of the host tier, where a GPU copies from it and its memory could not be pinned."""
        self._runner: ModelRunner | None = None

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
        return_freed_memory()
        weights = resolve_quantization(options.weights, model_dir)
        spec = read_model_spec(model_dir).with_quantization(weights.version)
        dtype = resolve_dtype(options.dtype, spec.dtype)
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)
        store = _weight_store(options, weights)
        if group is None:
            model = load_network(model_dir, _DTYPES[dtype], on_progress, store=store)
            kernels = load_kernels() if options.device == CPU else None
            network: Network
            if kernels is not None and can_compute(model):
                network = DenseDecoder(model, kernels)
            else:
                pack_linear_layers(model)
                pack_int8_layers(model)
                network = TransformersNetwork(model)
            ranks = 1
        else:
            sharding = Sharding(load_config(model_dir), group.place.rank, group.place.ranks)
            if store.device == CPU:  # which all ranks of the machine share
                store = replace(store, free_bytes=store.free_bytes // group.num_local)
            model = load_network(model_dir, _DTYPES[dtype], on_progress, sharding, store)
            pack_linear_layers(model)
            pack_int8_layers(model)
            connect_layers(model, sharding, group.collectives)
            network, ranks = TransformersNetwork(model, group.collectives), group.place.ranks
        keep_freed_memory()
        shapes = layer_cache_shapes(model.config, ranks)
        kv_dtype = dtype if options.kv_dtype == "auto" else options.kv_dtype
        layout = KVLayout.build(options.block_size_tokens, kv_dtype, shapes)
        return cls(network, replace(spec, dtype=dtype), layout, options.device)

    def allocate_cache(
        self, num_device_blocks: int, num_host_blocks: int = 0, audit: bool = False
    ) -> None:
        """Reserve both tiers; slots and blocks of earlier ones are gone. Raises OutOfMemory.

        `audit`: checksum blocks on their way to the host tier (plans say what must come back).
        """
        self.close()  # its memory counts as free for the new one
        tiers = reserve_tiers(self.layout, num_device_blocks, num_host_blocks, self.device)
        self.num_pageable_host_blocks = tiers.host.num_pageable_blocks
        self._runner = ModelRunner(
            self.network,
            SdpaAttention(tiers.device, _DTYPES[self.spec.dtype]),
            tiers.device,
            KVTransfer(tiers, audit=audit),
            self.spec.vocab_size,
        )

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
        if self._runner is None:
            raise EngineFailure("execute was called before allocate_cache")
        return self._runner.execute(plan)


def _weight_store(options: WorkerOptions, weights: Quantization) -> WeightStore:
    """Say where weights go; raises ConfigError for what the device cannot compute."""
    store = WeightStore(options.device, free_bytes(options.device))
    if weights.method == NO_QUANTIZATION:
        return store
    if options.device != CPU:
        raise ConfigError(
            f"model.quantization is {weights.method} on {options.device}; allowed: none (on "
            "CPUs int8, too)"
        )
    kernels = load_kernels()
    return replace(
        store,
        quantize=lambda weight: Int8Linear(weight, kernels),
        restore=lambda weight, scales: Int8Linear(weight, kernels, scales),
        quantization=weights,
    )


def check_ranks(model_dir: Path, ranks: int) -> None:
    """Raise ConfigError unless the checkpoint can be split so; reads no weights."""
    check_split(load_config(model_dir), ranks)


def resolve_dtype(asked: str, checkpoint: str) -> str:
    """Return the type to compute in."""
    dtype = asked
    if asked == "auto":
        dtype = _INSTEAD.get(checkpoint, checkpoint)
        if dtype != checkpoint:
            _log.info("the checkpoint is %s; computing in %s", checkpoint, dtype)
    if dtype not in _DTYPES:
        of = f" (from the checkpoint's {checkpoint})" if asked == "auto" else ""
        raise ConfigError(f"model.dtype is {dtype}{of}; allowed: auto, {', '.join(_DTYPES)}")
    return dtype
