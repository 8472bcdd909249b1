"""What the device knows of each slot in order to draw: its parameters, and what it has said.

Owns the tables and their layout. Parameters are two rows of numbers per slot. What depends on the
token (penalties, biases, bans) is one int32 per token of the vocabulary, in a table that only the
slots that need one have a row of: most requests have none, and a vocabulary is large. Host memory
is written once, when a slot starts; from then on the kernels keep the counts.

An entry, and what its bits say of the token:

    31 | 30 ........ 13 | 12 .......... 2 | 1                  | 0
     0 | times it was    | 1 + where its   | banned until       | in the
       | generated       | bias lies, or 0 | min_tokens         | prompt

Does not know logits, rows of a step, or how a token is drawn (gpu.sampling_kernels).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rillgate_server.core.sampling_params import MAX_LOGIT_BIASES, SamplingParams
from rillgate_server.core.step import SlotStart

FRACTIONS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Columns of SamplingTables.fractions."""
WHOLES = ("seed", "choice_index", "top_k", "min_tokens", "entry_row")
"""Columns of SamplingTables.wholes."""
IS_IN_PROMPT = 1
IS_BANNED = 2
BIAS_SHIFT = 2
BIAS_MASK = (1 << 11) - 1
COUNT_SHIFT = 13
MAX_COUNT = (1 << 18) - 1
"""Of an entry; a token said more often counts as said this often."""
BIAS_COLUMNS = MAX_LOGIT_BIASES + 1
"""The first is no bias."""

_LOWEST_TEMPERATURE = 1e-100
"""As worker.sampler's: below it a float64 quotient may overflow."""


@dataclass(frozen=True, slots=True)
class SlotDraws:
    """What the host has to know of a slot to choose kernels."""

    is_drawn: bool
    """Not the argmax."""
    is_filtered: bool
    """Drawn, and top_k, top_p or min_p may drop tokens."""
    has_entries: bool
    num_logprobs: int | None


class SamplingTables:
    """The slots' parameters and histories on the device.

    State: the five tables, which grow (then they are new tensors); each slot's SlotDraws
    (`_slots`); which entry rows are whose (`_entry_rows`) and which are free (`_free_rows`).
    All copies and kernels go to the current stream, so that a row's next owner comes after its
    last one's kernels.
    """

    def __init__(self, vocab_size: int, device: torch.device, num_slots: int) -> None:
        """Start with room for slots below `num_slots`, and none of them."""
        self.vocab_size = vocab_size
        self.fractions = torch.zeros(num_slots, len(FRACTIONS), dtype=torch.float64, device=device)
        """[capacity, len(FRACTIONS)], float64, on the device."""
        self.wholes = torch.zeros(num_slots, len(WHOLES), dtype=torch.int64, device=device)
        """[capacity, len(WHOLES)], int64, on the device. Seeds are 64 bits, whatever the sign."""
        self.last_tokens = torch.full((num_slots,), -1, dtype=torch.int64, device=device)
        """[capacity], int64, on the device: -1 where there is none."""
        self.entries = torch.zeros(1, vocab_size, dtype=torch.int32, device=device)
        """[num_entry_rows, vocab_size], int32, on the device; bits as drawn above."""
        self.biases = torch.zeros(1, BIAS_COLUMNS, dtype=torch.float64, device=device)
        """[num_entry_rows, BIAS_COLUMNS], float64, on the device."""
        self._pins = device.type == "cuda"
        self._slots: dict[int, SlotDraws] = {}  # slot -> what the host knows of it
        self._entry_rows: dict[int, int] = {}  # slot -> its row of entries
        self._free_rows = [0]

    def __repr__(self) -> str:
        """Show what a debugger asks for first."""
        return (
            f"SamplingTables({len(self._slots)} slots of {len(self.wholes)}, "
            f"{len(self._entry_rows)} entry rows of {len(self.entries)})"
        )

    def check_integrity(self) -> None:
        """Prove that each entry row is free or some slot's, once."""
        rows = sorted([*self._entry_rows.values(), *self._free_rows])
        assert rows == list(range(len(self.entries))), rows
        assert self._entry_rows.keys() <= self._slots.keys()

    def __getitem__(self, slot: int) -> SlotDraws:
        """Return what the host knows of a slot that has started."""
        return self._slots[slot]

    def start(self, start: SlotStart) -> None:
        """Write what a slot begins with. Copies without waiting."""
        self.end(start.slot)
        params = start.sampling
        self._make_room(start.slot)
        entry_row = self._write_entries(start) if _needs_entries(start) else -1
        top_k = params.top_k if params.top_k < self.vocab_size else 0
        fractions = (max(params.temperature, _LOWEST_TEMPERATURE) if params.temperature else 0.0,)
        fractions += tuple(getattr(params, name) for name in FRACTIONS[1:])
        seed = params.seed - (1 << 64 if params.seed >= 1 << 63 else 0)
        wholes = (seed, start.choice_index, top_k, params.min_tokens, entry_row)
        self._copy(fractions, self.fractions[start.slot])
        self._copy(wholes, self.wholes[start.slot])
        self.last_tokens[start.slot].fill_(-1)
        is_drawn = params.temperature > 0.0
        is_filtered = is_drawn and bool(top_k or params.top_p < 1.0 or params.min_p)
        self._slots[start.slot] = SlotDraws(
            is_drawn, is_filtered, entry_row >= 0, params.num_logprobs
        )

    def end(self, slot: int) -> None:
        """Forget a slot; nothing happens if it has not started."""
        self._slots.pop(slot, None)
        if slot in self._entry_rows:
            self._free_rows.append(self._entry_rows.pop(slot))

    def _make_room(self, slot: int) -> None:
        """Double the slots' tables until `slot` has its place."""
        capacity = len(self.wholes)
        if slot >= capacity:
            capacity = max(2 * capacity, slot + 1)
            self.fractions = _grown(self.fractions, capacity, 0)
            self.wholes = _grown(self.wholes, capacity, 0)
            self.last_tokens = _grown(self.last_tokens, capacity, -1)

    def _take_entry_row(self, slot: int) -> int:
        """Give a slot a row of entries, with whatever its last owner left in it."""
        if not self._free_rows:
            old = len(self.entries)
            capacity = 2 * old
            self.entries = _grown(self.entries, capacity, 0)
            self.biases = _grown(self.biases, capacity, 0)
            self._free_rows.extend(range(capacity - 1, old - 1, -1))
        self._entry_rows[slot] = self._free_rows.pop()
        return self._entry_rows[slot]

    def _write_entries(self, start: SlotStart) -> int:
        """Write a slot's history, bans and biases into a row of entries; return the row."""
        params = start.sampling
        biases = dict(params.logit_bias)  # of an id that is named twice the last one counts
        entry_row = self._take_entry_row(start.slot)
        entries = torch.zeros(self.vocab_size, dtype=torch.int32, pin_memory=self._pins)
        entries[_ids(start.token_ids[: start.num_prompt_tokens])] = IS_IN_PROMPT
        entries[_ids(params.banned_until_min_tokens)] |= IS_BANNED
        places = torch.arange(1, len(biases) + 1, dtype=torch.int32)
        entries[_ids(tuple(biases))] |= places << BIAS_SHIFT
        generated, counts = _ids(start.token_ids[start.num_prompt_tokens :]).unique(
            return_counts=True
        )
        entries[generated] |= counts.clamp(max=MAX_COUNT).int() << COUNT_SHIFT
        self.entries[entry_row].copy_(entries, non_blocking=True)
        self._copy((0.0, *biases.values()), self.biases[entry_row, : len(biases) + 1])
        return entry_row

    def _copy(self, values: Sequence[float], target: Tensor) -> None:
        """Copy numbers to the device without waiting; torch keeps pinned memory until then."""
        host = torch.tensor(values, dtype=target.dtype, pin_memory=self._pins)
        target.copy_(host, non_blocking=True)


def _needs_entries(start: SlotStart) -> bool:
    """Whether any token's logit may be changed by who it is."""
    params = start.sampling
    return bool(
        _has_penalties(params)
        or params.logit_bias
        or (
            params.banned_until_min_tokens
            and len(start.token_ids) - start.num_prompt_tokens < params.min_tokens
        )
    )


def _has_penalties(params: SamplingParams) -> bool:
    return bool(
        params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    )


def _ids(token_ids: Sequence[int]) -> Tensor:
    return torch.tensor(token_ids, dtype=torch.long)


def _grown(table: Tensor, capacity: int, empty: int) -> Tensor:
    """Return a copy of a table with more rows."""
    larger = table.new_full((capacity, *table.shape[1:]), empty)
    larger[: len(table)] = table
    return larger
