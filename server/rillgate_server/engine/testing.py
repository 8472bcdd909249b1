"""A data plane without tensors, for tests of everything above the worker.

Owns a cache whose "keys and values" are the tokens themselves with their positions, so it sees
what a real one would only answer wrongly to: before it draws, it gathers a row's whole context
through the slot's block table and compares it with the slot's tokens. The next token is a hash of
that context, so a wrong, stale or wrongly shared block changes every token after it.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import (
    FailedRow,
    RowPlan,
    SlotStart,
    StepPlan,
    StepResult,
    TokenLogprobs,
)


class CacheMismatch(AssertionError):
    """The blocks of a slot do not hold its tokens, or a plan contradicts what is set up."""


@dataclass(frozen=True, slots=True)
class FakeModel:
    """Draws tokens from a hash of everything before them."""

    vocab_size: int
    eos_token_id: int | None = None
    eos_probability: float = 0.0

    def next_token(
        self, context: Sequence[int], num_prompt_tokens: int, sampling: SamplingParams, choice: int
    ) -> int:
        """Return the token after `context`; with temperature 0 it depends on nothing else."""
        key = (0, 0) if sampling.temperature == 0.0 else (sampling.seed, choice)
        data = struct.pack(f"<QI{len(context)}I", *key, *context)
        digest = blake2b(data, digest_size=16).digest()
        first, second = (int.from_bytes(half, "little") for half in (digest[:8], digest[8:]))
        eos = self.eos_token_id
        is_eos_banned = (
            len(context) - num_prompt_tokens < sampling.min_tokens
            and eos in sampling.banned_until_min_tokens
        )
        if eos is not None and not is_eos_banned and first < self.eos_probability * 2**64:
            return eos
        token_id = second % self.vocab_size
        return (token_id + 1) % self.vocab_size if token_id == eos else token_id


class _FakeSlot:
    """A slot's tokens and block table, as a worker keeps them."""

    def __init__(self, start: SlotStart) -> None:
        self.start = start
        self.token_ids = list(start.token_ids)
        self.block_table = list(start.block_table)


class FakeExecutor:
    """Executes plans in memory.

    State: the blocks' contents, the slots, the number of steps and what they held.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size_tokens: int,
        model: FakeModel,
        *,
        before_step: Callable[[StepPlan], None] | None = None,
        fail_rows: Callable[[RowPlan, Sequence[int]], str | None] | None = None,
    ) -> None:
        """Start with empty blocks.

        `before_step` runs first in each step: it may wait, advance a virtual clock, or raise.
        `fail_rows` gets a row and its slot's tokens and returns a message to fail the row.
        """
        self.model = model
        self.slots: dict[int, _FakeSlot] = {}
        self.num_steps = 0
        self._size = block_size_tokens
        # block -> (token id, position) per place; None where nothing was written yet
        self._storage: list[list[tuple[int, int] | None]] = [
            [None] * block_size_tokens for _ in range(num_blocks)
        ]
        self._before_step = before_step
        self._fail_rows = fail_rows

    def __repr__(self) -> str:
        return f"FakeExecutor(steps={self.num_steps}, slots={sorted(self.slots)})"

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step; raises CacheMismatch when the plan or the cache is wrong."""
        self.num_steps += 1
        if self._before_step is not None:
            self._before_step(plan)
        for ended in plan.ended_slots:
            self.slots.pop(ended, None)
        for start in plan.starts:
            if start.slot in self.slots:
                raise CacheMismatch(f"slot {start.slot} starts and has not ended")
            self.slots[start.slot] = _FakeSlot(start)
        for row in plan.rows:  # all writes come first, as a layer writes all rows' keys first
            self._write(row)
        return self._sample(plan)

    def _write(self, row: RowPlan) -> None:
        slot = self.slots[row.slot]
        slot.block_table += row.new_blocks
        end = row.start + row.num_tokens
        if end > len(slot.token_ids) or row.num_tokens < 1:
            raise CacheMismatch(f"slot {row.slot} has {len(slot.token_ids)} tokens, row: {row}")
        if end > len(slot.block_table) * self._size:
            raise CacheMismatch(f"slot {row.slot} has no block for position {end - 1}")
        for position in range(row.start, end):
            block = slot.block_table[position // self._size]
            self._storage[block][position % self._size] = (slot.token_ids[position], position)

    def _sample(self, plan: StepPlan) -> StepResult:
        token_ids: list[tuple[int, ...]] = []
        logprobs: list[TokenLogprobs | None] = []
        prompt_logprobs: list[tuple[int, tuple[TokenLogprobs, ...]]] = []
        failed: list[FailedRow] = []
        for row in plan.rows:
            slot = self.slots[row.slot]
            context = self._gather(row, slot)
            message = self._fail_rows(row, context) if self._fail_rows is not None else None
            if message is not None:
                failed.append(FailedRow(row.slot, message))
            if row.prompt_logprobs:
                prompt_logprobs.append((row.slot, _prompt_entries(row, slot)))
            if row.samples:
                sampled = () if message is not None else (self._draw(slot, context),)
                slot.token_ids += sampled
                token_ids.append(sampled)
                num_top = slot.start.sampling.num_logprobs
                logprobs.append(
                    fake_logprobs(sampled[0], num_top) if sampled and num_top is not None else None
                )
        return StepResult(
            plan.step_id,
            tuple(token_ids),
            tuple(logprobs) if any(logprobs) else (),
            tuple(prompt_logprobs),
            tuple(failed),
        )

    def _draw(self, slot: _FakeSlot, context: Sequence[int]) -> int:
        start = slot.start
        if len(context) != len(slot.token_ids):
            raise CacheMismatch(f"slot {start.slot} samples before its last known token")
        return self.model.next_token(
            context, start.num_prompt_tokens, start.sampling, start.choice_index
        )

    def _gather(self, row: RowPlan, slot: _FakeSlot) -> list[int]:
        """Read the row's context through the block table, and compare it with the tokens."""
        context: list[int] = []
        num_tokens = row.start + row.num_tokens
        for position in range(num_tokens):
            block = slot.block_table[position // self._size]
            held = self._storage[block][position % self._size]
            if held != (slot.token_ids[position], position):
                raise CacheMismatch(
                    f"slot {row.slot}, position {position}: block {block} holds {held}, "
                    f"expected token {slot.token_ids[position]}"
                )
            context.append(held[0])
        return context


def fake_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """Return what the fake reports for a token: a function of the token alone."""
    logprob = -1.0 - token_id / 1024
    return TokenLogprobs(token_id, logprob, ((token_id, logprob),) if num_top else ())


def _prompt_entries(row: RowPlan, slot: _FakeSlot) -> tuple[TokenLogprobs, ...]:
    """One entry for each position of the row that predicts a prompt token."""
    start = slot.start
    end = min(row.start + row.num_tokens, start.num_prompt_tokens - 1)
    num_top = start.sampling.num_prompt_logprobs or 0
    return tuple(
        fake_logprobs(slot.token_ids[position + 1], num_top) for position in range(row.start, end)
    )
