"""Checkpoints that bitsandbytes' layers were saved in (transformers' `save_pretrained`).

    LLM.int8()   X.weight [out, in] int8, X.SCB [out] float32, X.weight_format
    NF4          X.weight [out * in / 2, 1] uint8, X.weight.absmax, .quant_map, .nested_absmax,
                 .nested_quant_map, .quant_state.bitsandbytes__nf4

Such a weight is read as the plain one that it stands for, in float32, and quantised again like any
other: both methods give their own values back, for the largest of a row or a block is among them.
So placing and splitting know plain weights alone. Does not know layers nor networks.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from bitsandbytes import functional
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rillgate_server.core.checkpoint import TensorEntry
from rillgate_server.core.quantization import BNB_INT8
from rillgate_server.errors import CheckpointError
from rillgate_server.worker.quantization.bitsandbytes_layers import NF4_BLOCK, plain_nf4
from rillgate_server.worker.sharding import TensorSplit

Entries = dict[str, TensorEntry]

_WEIGHT, _SCB = ".weight", ".SCB"
_STATE = ".weight.quant_state.bitsandbytes__nf4"
_NOT_NEEDED = (".weight_format",)


class StoredWeights:
    """The quantised weights of a checkpoint. State: none; small tensors are read as needed."""

    def __init__(self, method: str, model_dir: Path, entries: Entries) -> None:
        """Find them; raises CheckpointError for one whose scales are missing."""
        self._method = method
        self._entries = entries
        kind = "int8" if method == BNB_INT8 else "uint8"
        names = [
            name for name, it in entries.items() if name.endswith(_WEIGHT) and it.dtype == kind
        ]
        self._parts = {name: self._parts_of(name) for name in names}
        needed = (_SCB,) if method == BNB_INT8 else (f"{_WEIGHT}.absmax", _STATE)
        for name, parts in self._parts.items():
            layer = name.removesuffix(_WEIGHT)
            missing = [it for it in needed if f"{layer}{it}" not in parts]
            if missing:
                raise CheckpointError(
                    f"{model_dir} holds {name} in {method}, but not "
                    f"{', '.join(f'{layer}{it}' for it in missing)}"
                )
        self.shapes = {name: self._shape(name) for name in self._parts}
        """By a weight's name: [out_features, in_features]."""

    def plain_entries(self) -> Entries:
        """Return the files' tensors as if these weights were plain."""
        hidden = {part for parts in self._parts.values() for part in parts}
        plain = {name: it for name, it in self._entries.items() if name not in hidden}
        for name, shape in self.shapes.items():
            plain[name] = replace(self._entries[name], dtype="float32", shape=shape)
        return plain

    def read(self, name: str) -> Tensor | None:
        """Return a weight as it stands for, float32; None: it is none of these."""
        if name not in self._parts:
            return None
        stored, parts = self._tensor(name), self._parts[name]
        if self._method == BNB_INT8:
            scales = self._tensor(f"{name.removesuffix(_WEIGHT)}{_SCB}").float()
            return stored.float() * (scales / 127)[:, None]
        state = self._state(name, parts)
        return plain_nf4(stored, state)

    def check_split(self, name: str, split: TensorSplit | None) -> None:
        """Raise CheckpointError for a cut that falls inside a quantisation block of NF4."""
        block = NF4_BLOCK
        if name not in self._parts or split is None or self._method == BNB_INT8:
            return
        num_rows, num_columns = self.shapes[name]
        run = num_columns if split.dim == 0 else 1
        for at in (split.first * run, split.last * run):
            inside = at % block or (split.dim == 1 and num_columns % block)
            if inside and at not in (0, num_rows * run if split.dim == 0 else num_columns):
                raise CheckpointError(
                    f"{name} is stored in NF4 blocks of {block} weights, and the split over ranks "
                    f"cuts through one (its rows have {num_columns}); allowed: fewer ranks, or a "
                    "plain checkpoint with model.quantization bnb-nf4"
                )

    def _parts_of(self, name: str) -> tuple[str, ...]:
        """Name what else belongs to a weight."""
        layer = name.removesuffix(_WEIGHT)

        def find() -> Iterator[str]:
            for suffix in (_SCB, *_NOT_NEEDED):
                if f"{layer}{suffix}" in self._entries:
                    yield f"{layer}{suffix}"
            yield from (it for it in self._entries if it.startswith(f"{name}."))

        return tuple(find())

    def _shape(self, name: str) -> tuple[int, ...]:
        if self._method == BNB_INT8:
            return self._entries[name].shape
        return tuple(self._state(name, self._parts[name]).shape)

    def _state(self, name: str, parts: tuple[str, ...]) -> "functional.QuantState":
        """Read what else NF4 keeps of a weight; as float32's, whatever it was made from."""
        tensors = {part: self._tensor(part) for part in parts if part.startswith(f"{name}.")}
        state = functional.QuantState.from_dict(tensors, torch.device("cpu"))
        state.dtype = torch.float32
        return state

    def _tensor(self, name: str) -> Tensor:
        path = self._entries[name].file
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
