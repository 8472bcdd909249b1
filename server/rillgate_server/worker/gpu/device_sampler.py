"""Draws tokens on the device, and makes the host wait for nothing.

Gives worker.sampler's tokens (contracts, section 5). All that a call sends to the device is a few
numbers per row; all that it gives back stays there until somebody fetches it. A batch of greedy
rows costs two launches, drawn rows one more, filters one more again.

Owns the order of the launches, and what of a call's rows they concern. Does not know the slots'
tables (gpu.sampling_tables), plans or requests. Like the kernels, imported only where there is
a GPU or Triton's interpreter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import SlotStart, TokenLogprobs
from rillgate_server.worker.gpu.sampling_launches import (
    PART_LEN,
    Candidates,
    DrawnBatch,
    choose_filters,
    find_best,
    pick,
    weigh,
)
from rillgate_server.worker.gpu.sampling_tables import SamplingTables
from rillgate_server.worker.sampler import SampledToken

_FIRST_SLOTS = 64
"""Slots for which there is room at first; it doubles when a higher one starts."""
MAX_SCRATCH_BYTES = 128 << 20
"""Of a call, roughly: a hundred rows of 150,000 weights for the filters to look at, nearly one for
each of an H200's processors. More rows are worked on in turn."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One row to draw from."""

    slot: int
    num_generated: int
    """Tokens of the choice before this one, given ones included."""


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of the rows that asked, in their order."""

    chosen: Tensor
    """[num_asking], float32."""
    top_ids: Tensor
    """[num_asking, most that any asked for], int64; best first."""
    top_values: Tensor
    """The same, float32."""


@dataclass(frozen=True, slots=True)
class HostSample:
    """A DeviceSample on its way to the host."""

    token_ids: Tensor
    """[num_rows], int64, pinned where the device is a GPU."""
    logprobs: Logprobs | None
    num_logprobs: tuple[int | None, ...]
    """One per row; None: its slot did not ask."""

    def read(self) -> list[SampledToken]:
        """Return what each row gave. Only once the copies are done."""
        token_ids = [token_id if token_id >= 0 else None for token_id in self.token_ids.tolist()]
        if self.logprobs is None:
            return [SampledToken(token_id) for token_id in token_ids]
        asked = iter(
            zip(
                self.logprobs.chosen.tolist(),
                self.logprobs.top_ids.tolist(),
                self.logprobs.top_values.tolist(),
                strict=True,
            )
        )
        tokens = []
        for token_id, num_top in zip(token_ids, self.num_logprobs, strict=True):
            logprobs = None
            if num_top is not None:
                chosen, ids, values = next(asked)
                if token_id is not None:
                    top = tuple(zip(ids[:num_top], values[:num_top], strict=True))
                    logprobs = TokenLogprobs(token_id, chosen, top)
            tokens.append(SampledToken(token_id, logprobs))
        return tokens


@dataclass(frozen=True, slots=True)
class DeviceSample:
    """What one call gave, on the device."""

    token_ids: Tensor
    """[num_rows], int64; -1: the row has no token."""
    logprobs: Logprobs | None
    """None where no row asked."""
    num_logprobs: tuple[int | None, ...]
    """One per row; None: its slot did not ask."""

    def to_host(self) -> HostSample:
        """Start copies on the current stream, which must be the call's or come after it."""
        logprobs = self.logprobs and Logprobs(
            _to_host(self.logprobs.chosen),
            _to_host(self.logprobs.top_ids),
            _to_host(self.logprobs.top_values),
        )
        return HostSample(_to_host(self.token_ids), logprobs, self.num_logprobs)


class DeviceSampler:
    """Draws tokens on the device. State: what it knows of each slot (`_tables`).

    Everything is launched on the current stream, which must always be the same one.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        num_slots: int = _FIRST_SLOTS,
        part_len: int = PART_LEN,
        max_scratch_bytes: int = MAX_SCRATCH_BYTES,
    ) -> None:
        """Start without slots. `num_slots` have room; `part_len` is a power of two."""
        self.vocab_size = vocab_size
        self._tables = SamplingTables(vocab_size, device, num_slots)
        self._device = device
        self._part_len = part_len
        self._max_scratch_bytes = max_scratch_bytes

    def __repr__(self) -> str:
        """Show what a debugger asks for first."""
        return f"DeviceSampler({self._tables})"

    def check_integrity(self) -> None:
        """Prove that the tables' rows have one owner each."""
        self._tables.check_integrity()

    @property
    def last_tokens(self) -> Tensor:
        """Each slot's token drawn last; -1 where the row was broken, or none was drawn yet.

        [capacity], int64, on the device. Another tensor after a `start` that made room.
        """
        return self._tables.last_tokens

    def start(self, start: SlotStart) -> None:
        """Set up a slot, with what it has said so far. Waits for nothing."""
        self._tables.start(start)

    def end(self, slot: int) -> None:
        """Forget a slot; nothing happens if it has not started."""
        self._tables.end(slot)

    def sample(self, logits: Tensor, draws: Sequence[Draw]) -> DeviceSample:
        """Draw one token per row and note it in its slot. Waits for nothing.

        logits: [num_rows, vocab_size], bfloat16, float16 or float32, on the device, not changed.
        draws: one per row, each of another slot.
        """
        if not draws:
            return DeviceSample(logits.new_empty(0, dtype=torch.int64), None, ())
        slots = [self._tables[draw.slot] for draw in draws]
        filtered = [i for i, slot in enumerate(slots) if slot.is_filtered]
        plain = [i for i, slot in enumerate(slots) if slot.is_drawn and not slot.is_filtered]
        asking = [i for i, slot in enumerate(slots) if slot.num_logprobs is not None]
        rows = self._send_rows(draws, [*filtered, *plain], asking)
        any_entries = any(slot.has_entries for slot in slots)
        batch = DrawnBatch.of(logits, rows, self._tables, any_entries, self._part_len)
        find_best(batch)
        self._weigh_and_filter(batch, len(filtered), len(filtered) + len(plain))
        pick(batch, any_drawn=bool(filtered or plain))
        num_logprobs = tuple(slot.num_logprobs for slot in slots)
        logprobs = None
        if asking:
            logprobs = self._logprobs(batch, len(asking), max(n or 0 for n in num_logprobs))
        return DeviceSample(batch.token_ids, logprobs, num_logprobs)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile the kernels for logits of this type, which takes seconds. No slot changes."""
        other = DeviceSampler(self._tables.vocab_size, self._device, 4, self._part_len)
        settings = (
            SamplingParams(seed=0, temperature=0.0),
            SamplingParams(seed=0, temperature=0.0, repetition_penalty=2.0),
            SamplingParams(seed=0, top_p=0.5),
            SamplingParams(seed=0, top_p=0.5, repetition_penalty=2.0),
        )
        logits = torch.zeros(1, self._tables.vocab_size, dtype=dtype, device=self._device)
        for slot, params in enumerate(settings):
            other.start(SlotStart(slot, (), 0, (), params, 0))
            other.sample(logits, [Draw(slot, 0)])

    def _send_rows(
        self, draws: Sequence[Draw], drawn: Sequence[int], asking: Sequence[int]
    ) -> Tensor:
        """Return DrawnBatch.rows, on its way to the device."""
        numbers = (
            [draw.slot for draw in draws],
            [draw.num_generated for draw in draws],
            [*drawn, *[0] * (len(draws) - len(drawn))],
            [*asking, *[0] * (len(draws) - len(asking))],
        )
        pins = self._device.type == "cuda"
        host = torch.tensor(numbers, dtype=torch.int32, pin_memory=pins)
        return host.to(self._device, non_blocking=True)

    def _weigh_and_filter(self, batch: DrawnBatch, num_filtered: int, num_drawn: int) -> None:
        """Launch what drawn rows need before the pick; filtered ones in turns where many."""
        row_bytes = 8 * batch.num_parts * batch.part_len
        at_once = max(1, self._max_scratch_bytes // row_bytes)
        candidates = Candidates.of(batch, min(num_filtered, at_once)) if num_filtered else None
        for first in range(0, num_filtered, at_once):
            end = min(first + at_once, num_filtered)
            assert candidates is not None
            weigh(batch, candidates, first, (num_drawn if end == num_filtered else end) - first)
            choose_filters(batch, candidates, first, end - first)
        if num_drawn and not num_filtered:
            weigh(batch, None, 0, num_drawn)

    def _logprobs(self, batch: DrawnBatch, num_asking: int, num_top: int) -> Logprobs:
        """Return those of the rows that asked, from the raw logits, as worker.sampler does."""
        asking = batch.rows[3, :num_asking].long()
        at_once = max(1, self._max_scratch_bytes // (8 * batch.tables.vocab_size))
        chosen, top_values, top_ids = [], [], []
        for rows in asking.split(at_once):
            logprobs = torch.log_softmax(batch.logits[rows].float(), dim=-1)
            token_ids = batch.token_ids[rows].clamp(min=0)
            chosen.append(logprobs.gather(1, token_ids[:, None])[:, 0])
            values, ids = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
            top_values.append(values)
            top_ids.append(ids)
        return Logprobs(torch.cat(chosen), torch.cat(top_ids), torch.cat(top_values))


def _to_host(tensor: Tensor) -> Tensor:
    """Return a copy, under way into pinned memory where the tensor is on a GPU."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
