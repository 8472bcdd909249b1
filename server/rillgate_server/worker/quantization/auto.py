"""Measures what `model.quantization = auto` chooses from: `python -m …auto DIR DTYPE THREADS`.

A network of the checkpoint's shape, but two layers and random weights, takes decode steps of one
row and of sixteen, and a prompt, in each method: speed does not hang on the weights' values. int8
is taken where it is faster, or the only one that fits into memory; bnb-nf4 where nothing else
fits. bnb-int8 is never: it takes int8's memory and more time (docs/performance.md).

Owns the measurement and the decision. Where it is kept is core.quantization_choice's.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from rillgate_server.core.checkpoint import read_model_spec
from rillgate_server.core.model_spec import INT8, NO_QUANTIZATION, KVLayout
from rillgate_server.core.quantization import BNB_NF4, Quantization
from rillgate_server.core.quantization_choice import Choice
from rillgate_server.worker.attention.base import PackedRow, PackedStep
from rillgate_server.worker.attention.choice import make_attention, triton_works
from rillgate_server.worker.compute_device import CPU, find_device, free_bytes, wait_for
from rillgate_server.worker.kernels.library import load_kernels
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.memory_needs import memory_needs
from rillgate_server.worker.model_loader import WeightStore, random_network
from rillgate_server.worker.network.base import Network
from rillgate_server.worker.network.transformers_network import layer_cache_shapes
from rillgate_server.worker.quantization.methods import with_layers
from rillgate_server.worker.worker import choose_network, resolve_dtype

_NUM_LAYERS = 2
_STEPS = {"a decode step of 1": (1, 1), "of 16": (16, 1), "256 prompt tokens": (1, 256)}
"""What is measured -> (rows, new tokens of each)."""
_CONTEXT_TOKENS = 512
_BLOCK_TOKENS = 16
_NUM_SAMPLES = 7
_NUM_REPLAYS = 20
"""Of a captured step, for a sample."""
_FASTER = 0.95
"""int8 is taken below this part of the time: its answers are not quite the exact ones."""

Times = dict[str, float]  # what -> seconds


def choose(model_dir: Path, dtype_name: str, device: torch.device) -> Choice:
    """Measure and decide."""
    needs = {it.method: it for it in memory_needs(model_dir).weights}
    free = free_bytes(device)
    fitting = [it for it in (NO_QUANTIZATION, INT8) if needs[it].peak_bytes <= free]
    sizes = ", ".join(f"{m} {needs[m].num_bytes / 1e6:.0f}" for m in (NO_QUANTIZATION, INT8))
    memory = f"MB of weights: {sizes}; free {free / 1e6:.0f}"
    if not fitting:
        return Choice(BNB_NF4, f"nothing else fits ({memory})")
    if fitting == [INT8]:
        return Choice(INT8, f"the exact weights do not fit ({memory})")
    spec = read_model_spec(model_dir)
    dtype: torch.dtype = getattr(torch, resolve_dtype(dtype_name, spec.dtype, device.type))
    exact, int8 = _measure(model_dir, dtype, device)
    ratios = {what: int8[what] / exact[what] for what in _STEPS}
    mean = statistics.geometric_mean(ratios.values())
    measured = ", ".join(f"{what} {ratio:.2f}" for what, ratio in ratios.items())
    why = f"int8 takes {mean:.2f} of the time of the exact weights ({measured}); {memory}"
    return Choice(INT8 if mean < _FASTER else NO_QUANTIZATION, why)


@torch.inference_mode()
def _measure(model_dir: Path, dtype: torch.dtype, device: torch.device) -> tuple[Times, Times]:
    """Return seconds without quantisation, and in int8; medians of samples taken in turn."""
    runs = [
        _Run(model_dir, dtype, device, Quantization(method)) for method in (NO_QUANTIZATION, INT8)
    ]
    found: list[Times] = [{}, {}]
    for what, (rows, tokens) in _STEPS.items():
        samples: list[list[float]] = [[], []]
        for number in range(_NUM_SAMPLES + 2):
            for run, own in zip(runs, samples, strict=True):
                seconds = run.step(rows, tokens)
                if number >= 2:  # the first ones warm up
                    own.append(seconds)
        for times, own in zip(found, samples, strict=True):
            times[what] = statistics.median(own)
    return found[0], found[1]


class _Run:
    """A network in one method, with a cache. State: none but the cache's bytes."""

    def __init__(
        self, model_dir: Path, dtype: torch.dtype, device: torch.device, weights: Quantization
    ) -> None:
        kernels = load_kernels() if device == CPU else None
        store = with_layers(WeightStore(device, free_bytes(device)), weights, kernels)
        model = random_network(model_dir, dtype, _NUM_LAYERS, store)
        uses_triton = triton_works(device)
        self._network: Network = choose_network(model, kernels, uses_triton=uses_triton)
        shapes = layer_cache_shapes(model.config)
        kv_dtype = str(dtype).removeprefix("torch.")
        layout = KVLayout.build(_BLOCK_TOKENS, kv_dtype, shapes)
        num_rows = max(rows for rows, _ in _STEPS.values())
        num_blocks = num_rows * _CONTEXT_TOKENS // _BLOCK_TOKENS
        self._storage = KVStorage(layout, num_blocks, device=device)
        heads = self._network.num_heads if uses_triton else None
        self._attention = make_attention(self._storage, dtype, heads)
        self._device = device
        self._captured: dict[int, Callable[[], Tensor] | None] = {}  # rows -> their decode step
        if uses_triton:
            capture = import_module("rillgate_server.worker.gpu.assembly").capture_one_step
            for num_rows, num_tokens in _STEPS.values():
                if num_tokens == 1:
                    captured = capture(self._network, self._attention, num_rows, _CONTEXT_TOKENS)
                    self._captured[num_rows] = captured

    def step(self, num_rows: int, num_tokens: int) -> float:
        """Return the seconds of a step whose rows end at _CONTEXT_TOKENS.

        On a GPU of the captured one, where it can be: two layers launched one by one would show
        what launches take.
        """
        captured = self._captured.get(num_rows) if num_tokens == 1 else None
        if captured is None:
            return self._launched(num_rows, num_tokens)
        began_s = time.perf_counter()
        for _ in range(_NUM_REPLAYS):
            captured()
        wait_for(self._device)
        return (time.perf_counter() - began_s) / _NUM_REPLAYS

    def _launched(self, num_rows: int, num_tokens: int) -> float:
        per_row = _CONTEXT_TOKENS // _BLOCK_TOKENS
        tables = torch.arange(num_rows * per_row).view(num_rows, per_row)
        start = _CONTEXT_TOKENS - num_tokens
        positions = torch.arange(start, _CONTEXT_TOKENS)
        step = PackedStep(
            torch.arange(num_rows * num_tokens) % 64,
            positions.repeat(num_rows),
            (tables[:, positions // _BLOCK_TOKENS].flatten(), positions.repeat(num_rows) % 16),
            tuple(PackedRow(i * num_tokens, start, num_tokens, tables[i]) for i in range(num_rows)),
        )
        on_device = step.on(self._device)
        prepared = self._attention.prepare(on_device)
        wait_for(self._device)
        began_s = time.perf_counter()
        self._network.hidden(on_device.token_ids, on_device.positions, prepared)
        wait_for(self._device)
        return time.perf_counter() - began_s


def main() -> None:
    """Print a Choice as JSON."""
    model_dir, dtype, num_threads = sys.argv[1:]
    if int(num_threads):
        torch.set_num_threads(int(num_threads))
    print(json.dumps(asdict(choose(Path(model_dir), dtype, find_device()))))


if __name__ == "__main__":
    main()
