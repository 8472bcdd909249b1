"""What a step looks like to the attention, and what an implementation offers.

Owns the packed step: all tokens of all rows behind one another, without padding. Does not know
requests, sampling, or how attention is computed.

    token_ids:   | row 0: chunk of a prompt        | row 1 | row 2 | row 3: another chunk |
    row.offset:  ^0                                ^n0     ^n0+1   ^n0+2
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from rillgate_server.worker.layer_cache import LayerCache, SlotMapping


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One row of a step: a run of positions of one slot."""

    offset: int
    """Of its first token in the packed tensors."""
    start: int
    """Position of its first token."""
    num_tokens: int
    block_table: Tensor
    """[at least the slot's blocks], int64, CPU. Entries past its blocks hold its first block, so
    that a gather may overshoot into memory that is the row's own."""


@dataclass(frozen=True, slots=True)
class PackedStep:
    """One step's tensors and rows."""

    token_ids: Tensor
    """[num_tokens], int64."""
    positions: Tensor
    """[num_tokens], int64."""
    slot_mapping: tuple[Tensor, Tensor]
    """Where each token's key and value go: (block [num_tokens], offset in it [num_tokens])."""
    rows: tuple[PackedRow, ...]

    def on(self, device: torch.device) -> "PackedStep":
        """Return it with its tensors on `device`; block tables stay, for planning."""
        blocks, offsets = self.slot_mapping
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            slot_mapping=(blocks.to(device), offsets.to(device)),
        )


class AttentionStep(Protocol):
    """One step's attention, made once and called by every layer."""

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Store the new keys and values, then attend.

        query: [num_heads, num_tokens, key_dim]; key: [num_kv_heads, num_tokens, key_dim]; value:
        [num_kv_heads, num_tokens, value_dim]. Returns [num_tokens, num_heads, value_dim].
        """
        ...


class ReadingStep(AttentionStep, Protocol):
    """A step that reads what somebody else has stored: the layers around it store keys and values
    themselves, in the kernel that rotates them."""

    @property
    def slot_mapping(self) -> SlotMapping:
        """Where the step's tokens go; on the device."""
        ...

    def cache(self, layer_index: int) -> LayerCache:
        """Return where a layer's keys and values are kept."""
        ...

    def read(self, layer_index: int, query: Tensor, scaling: float) -> Tensor:
        """Attend to what the cache holds by now, the step's own tokens included.

        query: [num_tokens, num_heads, key_dim], of any strides but the last. Returns [num_tokens,
        num_heads, value_dim].
        """
        ...


class AttentionBackend(Protocol):
    """A way to compute attention over the cache."""

    def prepare(self, step: PackedStep) -> AttentionStep:
        """Work out once per step what all layers share: gather lists, masks."""
        ...
