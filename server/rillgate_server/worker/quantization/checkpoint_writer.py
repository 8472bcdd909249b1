"""A plain checkpoint rewritten with its layers in INT8, which loads without being quantised again.

Owns the new directory: the weight files, tensor by tensor (what is in memory is one of them), their
index, config.json, and copies of what else there is. It appears whole or not at all. The format is
compressed-tensors' (core.quantization): a layer's `weight` in int8, its `weight_scale`
[out_features, 1] in float32. Does not know how a checkpoint is loaded.
"""

import json
import math
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rillgate_server.core.checkpoint import (
    TensorEntry,
    read_config,
    read_model_spec,
    read_tensor_entries,
    weight_files,
)
from rillgate_server.core.quantization import (
    AS_THEY_ARE,
    Quantization,
    describe_int8,
    resolve_quantization,
)
from rillgate_server.errors import CheckpointError, ConfigError
from rillgate_server.worker.model_loader import empty_network
from rillgate_server.worker.quantization.int8 import quantize_weight
from rillgate_server.worker.weight_places import Progress, Target, place_all
from rillgate_server.worker.weight_plan import (
    SCALES_SUFFIX,
    Form,
    WeightPlan,
    embedding_name,
    head_name,
    plan_weights,
)

_CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".safetensors")
"""Files that are not copied: they hold the plain weights, or may."""


@dataclass(frozen=True, slots=True)
class _Written:
    """A tensor of a new file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return math.prod(self.shape) * dtype.itemsize


def quantize_checkpoint(
    source: Path,
    target: Path,
    quantization: Quantization,
    dtype: torch.dtype,
    on_progress: Progress | None = None,
) -> None:
    """Write `target`; its weights are those that `source` is given when it loads in `dtype`.

    Raises ConfigError for a `target` that holds something or a pattern that matches no layer,
    CheckpointError for a `source` that could not be loaded, or is quantised already.
    """
    read_model_spec(source)
    if resolve_quantization(AS_THEY_ARE, source).is_stored:
        raise CheckpointError(f"{source} is quantised already; allowed: plain weights")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is not empty; allowed: a directory that is new or empty")
    entries = read_tensor_entries(source)
    model = empty_network(source, dtype)
    plan = plan_weights(model, dtype, quantization, None, ())
    targets = {
        name: Target(it.shape, torch.empty(it.shape, dtype=it.dtype, device="meta"), None)
        for name, it in plan.tensors.items()
    }
    place_all(model, entries, targets)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(source, partial, _Rewrite(entries, plan, dtype), on_progress)
        names = (embedding_name(model), head_name(model))
        quantized = {n for n in names if _is_quantised(plan, n)}
        ignored = sorted(_left_out(plan) | {names[1]} - quantized)
        config = read_config(source)
        config["quantization_config"] = describe_int8(ignored, names[0] in quantized)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _copy_others(source, partial)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _is_quantised(plan: WeightPlan, layer: str) -> bool:
    planned = plan.tensors.get(f"{layer}.weight")
    return planned is not None and planned.form is Form.TO_QUANTIZE


def _left_out(plan: WeightPlan) -> set[str]:
    """Name linear layers that stay as they are."""
    return {
        name.removesuffix(".weight")
        for name, it in plan.tensors.items()
        if name.endswith("_proj.weight") and it.form is Form.PLAIN
    }


class _Rewrite:
    """What becomes of each tensor of the files. State: none."""

    def __init__(
        self, entries: Mapping[str, TensorEntry], plan: WeightPlan, dtype: torch.dtype
    ) -> None:
        self.entries = entries
        self._plan = plan
        self._dtype = dtype

    def layout(self, name: str) -> dict[str, _Written]:
        """Say what a tensor becomes; stacked experts become one tensor each."""
        entry = self.entries[name]
        if (parts := self._experts(name)) is not None:
            num_rows = entry.shape[1] // (1 if name.endswith("down_proj") else 2)
            shape = (num_rows, entry.shape[2])
            return {k: v for part in parts for k, v in self._one(part, entry.dtype, shape).items()}
        return self._one(name, entry.dtype, entry.shape)

    def tensors(self, name: str, stored: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Give what a tensor becomes, one after another."""
        parts = self._experts(name)
        if parts is None:
            yield from self._make(name, stored)
            return
        per_expert = 1 if name.endswith("down_proj") else 2
        for i, part in enumerate(parts):
            yield from self._make(part, stored[i // per_expert].chunk(per_expert)[i % per_expert])

    def _experts(self, name: str) -> list[str] | None:
        """Name the layers in a stack; None: it stays one, or is none."""
        prefix, _, kind = name.rpartition(".")
        if prefix not in self._plan.experts or kind not in ("gate_up_proj", "down_proj"):
            return None
        halves = ("down_proj",) if kind == "down_proj" else ("gate_proj", "up_proj")
        num_experts = self.entries[name].shape[0]
        return [f"{prefix}.{i}.{half}.weight" for i in range(num_experts) for half in halves]

    def _one(self, name: str, dtype: str, shape: tuple[int, ...]) -> dict[str, _Written]:
        layer = name.removesuffix(".weight")
        if not _is_quantised(self._plan, layer):
            return {name: _Written(dtype, shape)}
        return {
            name: _Written("int8", shape),
            f"{layer}{SCALES_SUFFIX}": _Written("float32", (shape[0], 1)),
        }

    def _make(self, name: str, stored: Tensor) -> Iterator[tuple[str, Tensor]]:
        layer = name.removesuffix(".weight")
        if not _is_quantised(self._plan, layer):
            yield name, stored
            return
        whole, scales = quantize_weight(stored.to(self._dtype))
        yield name, whole
        yield f"{layer}{SCALES_SUFFIX}", scales[:, None]


def _write_weights(
    source: Path, target: Path, rewrite: _Rewrite, on_progress: Progress | None
) -> None:
    """Write the weight files, and their index where there are several."""
    total_bytes = sum(entry.num_bytes for entry in rewrite.entries.values())
    done_bytes, written_bytes = 0, 0
    weight_map: dict[str, str] = {}  # tensor -> file
    files = weight_files(source)
    for path in files:
        names = [name for name, entry in rewrite.entries.items() if entry.file == path]
        layout = {k: v for name in names for k, v in rewrite.layout(name).items()}
        weight_map |= dict.fromkeys(layout, path.name)
        written_bytes += sum(it.num_bytes for it in layout.values())
        try:
            with safe_open(path, framework="pt") as read, (target / path.name).open("wb") as file:
                starts = _write_header(file, layout)
                for name in names:
                    for part, tensor in rewrite.tensors(name, read.get_tensor(name)):
                        file.seek(starts[part])
                        raw = tensor.contiguous().flatten().view(torch.uint8)
                        raw.numpy().tofile(file)
                    done_bytes += rewrite.entries[name].num_bytes
                    if on_progress is not None:
                        on_progress(done_bytes, total_bytes)
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        except OSError as error:
            raise CheckpointError(f"{target / path.name} cannot be written: {error}") from error
    if len(files) > 1:
        index = {"metadata": {"total_size": written_bytes}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_header(file: BinaryIO, layout: Mapping[str, _Written]) -> dict[str, int]:
    """Write a file's header; return where each tensor's bytes begin.

    | u64le length | JSON, filled up to 8 bytes | tensors, the widest types first, so all aligned |
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end, starts = 0, {}
    for name in sorted(layout, key=lambda it: (-getattr(torch, layout[it].dtype).itemsize, it)):
        written = layout[name]
        starts[name] = end
        end += written.num_bytes
        header[name] = {
            "dtype": _CODES[written.dtype],
            "shape": list(written.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    first = 8 + len(text)
    file.truncate(first + end)
    return {name: first + start for name, start in starts.items()}


def _copy_others(source: Path, target: Path) -> None:
    """Copy the files that hold no weights and were not written."""
    for path in source.iterdir():
        is_weights = path.suffix in _OTHER_WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
