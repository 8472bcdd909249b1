"""What a checkpoint would take in memory, for each way to hold it, before any weight is read.

Read from config.json and the headers of the weights' files, by the loader's own plan. Owns the
sums. Does not know what memory there is, nor what a replica needs beside weights and cache.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from rillgate_server.config.groups import QUANTIZATIONS
from rillgate_server.core.checkpoint import read_model_spec, read_tensor_entries
from rillgate_server.core.model_spec import INT8, KVLayout, ModelSpec
from rillgate_server.core.quantization import Quantization, resolve_quantization
from rillgate_server.errors import ConfigError
from rillgate_server.worker.model_loader import empty_network
from rillgate_server.worker.network.transformers_network import layer_cache_shapes
from rillgate_server.worker.sharding import Sharding
from rillgate_server.worker.weight_plan import plan_weights, stored_layers
from rillgate_server.worker.worker import check_ranks, resolve_dtype

METHODS = QUANTIZATIONS
_BLOCK_SIZE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class WeightNeed:
    """Of weights held in one way."""

    method: str
    """A value of model.quantization."""
    is_stored: bool
    """The files hold them so."""
    num_bytes: int
    peak_bytes: int
    """While they are loaded: one layer's weight more where layers are quantised."""


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Of one rank: the one that needs most."""

    spec: ModelSpec
    dtype: str
    """In which is computed."""
    num_parameters: int
    """Of the whole model; a tied head counts once."""
    weights: tuple[WeightNeed, ...]
    cache_bytes_per_token: dict[str, float]
    """By type of keys and values."""


def memory_needs(model_dir: Path, ranks: int = 1) -> MemoryNeeds:
    """Work it out. Raises CheckpointError, or ConfigError for a split that does not divide."""
    if ranks < 1:
        raise ConfigError(f"--tensor-parallel is {ranks}; allowed: 1 or more")
    spec = read_model_spec(model_dir)
    name = resolve_dtype("auto", spec.dtype)
    dtype: torch.dtype = getattr(torch, name)
    entries = read_tensor_entries(model_dir)
    model = empty_network(model_dir, dtype)
    sharding = None
    if ranks > 1:
        check_ranks(model_dir, ranks)
        sharding = Sharding(model.config, 0, ranks)  # rank 0's parts are the ones that are full
    stored = resolve_quantization(Quantization(), model_dir)
    ways = [stored] if stored.is_stored else [Quantization(method) for method in METHODS]
    weights = []
    for way in ways:
        plan = plan_weights(model, dtype, way, sharding, stored_layers(entries))
        peak_bytes = plan.num_bytes + plan.staged_bytes
        weights.append(WeightNeed(way.method, way.is_stored, plan.num_bytes, peak_bytes))
    shapes = layer_cache_shapes(model.config, ranks)
    layouts = {it: KVLayout.build(_BLOCK_SIZE_TOKENS, it, shapes) for it in (name, INT8)}
    return MemoryNeeds(
        spec,
        name,
        sum(it.numel() for it in model.parameters()),
        tuple(weights),
        {kind: layout.block_bytes / _BLOCK_SIZE_TOKENS for kind, layout in layouts.items()},
    )


def run_inspect(model_dir: Path, ranks: int) -> int:
    """Print it; return the exit code."""
    needs = memory_needs(model_dir, ranks)
    spec = needs.spec
    print(
        f"{model_dir}: {spec.architecture}, {needs.num_parameters:,} parameters, {spec.dtype}, "
        f"context {spec.max_context_tokens:,} tokens"
    )
    if ranks > 1:
        print(f"each of {ranks} ranks takes at most:")
    rows = [("model.quantization", "weights", "peak while loading")]
    for it in needs.weights:
        method = f"{it.method} (as stored)" if it.is_stored else it.method
        rows.append((method, _megabytes(it.num_bytes), _megabytes(it.peak_bytes)))
    rows += [("", "", ""), ("cache.kv_dtype", "cache per 1,000 tokens", "")]
    for kind, num_bytes in needs.cache_bytes_per_token.items():
        name = f"auto ({kind})" if kind == needs.dtype else kind
        rows.append((name, _megabytes(1000 * num_bytes), ""))
    for first, second, third in rows:
        print(f"{first:<22}{second:>22}{third:>22}".rstrip())
    return 0


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
