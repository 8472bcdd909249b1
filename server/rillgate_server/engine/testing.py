"""A data plane without tensors, for tests of everything above the worker.

Owns slots, and a cache whose "keys and values" are the tokens with a digest of everything before
them, so it sees what a real one would only answer wrongly to: before it draws, it gathers a row's
whole context through the slot's block table and compares it with the slot's tokens. The next token
is a hash of that context, so a wrong, stale or wrongly shared block changes every token after it.
What the blocks of both tiers hold, and the copies between them, are `engine.testing_storage`'s.
"""

import struct
from collections import deque
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
from rillgate_server.engine.testing_storage import CacheMismatch, Cell, FakeCopies, FakeStorage

__all__ = [
    "CacheMismatch",
    "FakeCopies",
    "FakeExecutor",
    "FakeModel",
    "FakeSlot",
    "PipelinedFakeExecutor",
    "fake_logprobs",
]

_NO_HOST_TIER = FakeCopies()
_NO_TOKEN: Cell = (0, 0)
"""What a sequence's first token follows."""


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


class FakeSlot:
    """A slot's tokens and block table, as a worker keeps them."""

    def __init__(self, start: SlotStart) -> None:
        self.start = start
        self.token_ids: list[int] = []
        self.cells: list[Cell] = []  # position -> what the cache must hold there
        self.block_table = list(start.block_table)
        self.is_failed = False
        """Whether a row of it failed: as with NaN, so does every row behind it."""
        self.append(start.token_ids)

    def copy(self) -> "FakeSlot":
        """Return another with the same tokens, for a draft model to go ahead on."""
        ahead = FakeSlot(self.start)
        ahead.append(self.token_ids[len(self.start.token_ids) :])
        return ahead

    def append(self, token_ids: Sequence[int]) -> None:
        """Add known tokens."""
        for token_id in token_ids:
            self.cells.append(_cell_after(self.cells[-1] if self.cells else _NO_TOKEN, token_id))
        self.token_ids += token_ids


class FakeExecutor:
    """Executes plans in memory.

    State: the storage with its copies in flight, the slots, the number of steps.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size_tokens: int,
        model: FakeModel,
        *,
        before_step: Callable[[StepPlan], None] | None = None,
        fail_rows: Callable[[RowPlan, Sequence[int]], str | None] | None = None,
        copies: FakeCopies = _NO_HOST_TIER,
    ) -> None:
        """Start with empty blocks.

        `before_step` runs in each step once its copies have begun: it may wait, advance a virtual
        clock, or raise. `fail_rows` gets a row and its slot's tokens and returns a message to fail
        the row. `copies` says what the host tier is like; without it there is none.
        """
        self.model = model
        self.slots: dict[int, FakeSlot] = {}
        self.num_steps = 0
        self._size = block_size_tokens
        self._storage = FakeStorage(num_blocks, block_size_tokens, copies)
        self._before_step = before_step
        self._fail_rows = fail_rows
        self.propose: Callable[[FakeSlot], tuple[int, ...]] = lambda slot: ()
        """The draft model: gets a slot, and returns what it takes to come next. A test sets it."""

    def __repr__(self) -> str:
        return f"FakeExecutor(steps={self.num_steps}, slots={sorted(self.slots)}, {self._storage})"

    @property
    def num_copies_in_flight(self) -> int:
        """Copies that have begun and were not reported."""
        return self._storage.num_in_flight

    def corrupt(self, host_block: int) -> None:
        """Change what a host block holds behind everybody's back, as a broken memory would."""
        self._storage.corrupt(host_block)

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step; raises CacheMismatch when the plan or the cache is wrong."""
        self.begin_copies(plan)
        return self.compute(plan)

    def begin_copies(self, plan: StepPlan) -> None:
        """Begin a plan's copies, ahead of the rest of it."""
        for job in plan.copies:
            self._storage.begin(job)

    def compute(self, plan: StepPlan) -> StepResult:
        """Compute one step whose copies have begun; raises CacheMismatch as `execute` does."""
        self.num_steps += 1
        if self._before_step is not None:
            self._before_step(plan)
        for ended in plan.ended_slots:
            self.slots.pop(ended, None)
        for start in plan.starts:
            if start.slot in self.slots:
                raise CacheMismatch(f"slot {start.slot} starts and has not ended")
            for block in start.block_table:
                self._storage.check_named(block)
            self.slots[start.slot] = FakeSlot(start)
        for row in plan.rows:  # all writes come first, as a layer writes all rows' keys first
            self._write(row)
        return self._sample(plan)

    def _write(self, row: RowPlan) -> None:
        slot = self.slots[row.slot]
        slot.block_table += row.new_blocks
        if slot.is_failed:
            return
        end = row.start + row.num_tokens
        known_end = end - len(row.draft_token_ids)
        is_behind = known_end == len(slot.token_ids) and row.samples
        if known_end > len(slot.token_ids) or known_end <= row.start:
            raise CacheMismatch(f"slot {row.slot} has {len(slot.token_ids)} tokens, row: {row}")
        if row.draft_token_ids and not is_behind:
            raise CacheMismatch(f"slot {row.slot} has drafts that do not follow its tokens: {row}")
        tokens = [*slot.token_ids, *row.draft_token_ids]
        if end > len(slot.block_table) * self._size:
            raise CacheMismatch(f"slot {row.slot} has no block for position {end - 1}")
        # What a position leaves in the cache follows from what the cache held before it.
        before = self._held(slot, row.start - 1) if row.start else _NO_TOKEN
        for position in range(row.start, end):
            before = _cell_after(before or _NO_TOKEN, tokens[position])
            block = slot.block_table[position // self._size]
            self._storage.write(block, position % self._size, before)

    def _held(self, slot: FakeSlot, position: int) -> Cell | None:
        block = slot.block_table[position // self._size]
        return self._storage.read(block, position % self._size)

    def _sample(self, plan: StepPlan) -> StepResult:
        token_ids: list[tuple[int, ...]] = []
        logprobs: list[tuple[TokenLogprobs, ...]] = []
        proposals: list[tuple[int, ...]] = []
        prompt_logprobs: list[tuple[int, tuple[TokenLogprobs, ...]]] = []
        failed: list[FailedRow] = []
        for row in plan.rows:
            slot = self.slots[row.slot]
            context = [] if slot.is_failed else self._gather(row, slot)
            message = self._fault_of(row, slot, context)
            if message is not None:
                slot.is_failed = True
                failed.append(FailedRow(row.slot, message))
            if row.prompt_logprobs:
                prompt_logprobs.append((row.slot, _prompt_entries(row, slot)))
            if row.samples:
                sampled = () if message is not None else self._draw(row, slot, context)
                token_ids.append(sampled)
                proposals.append(self.propose(slot)[: row.num_proposals] if sampled else ())
                num_top = slot.start.sampling.num_logprobs
                logprobs.append(
                    () if num_top is None else tuple(fake_logprobs(it, num_top) for it in sampled)
                )
        return StepResult(
            plan.step_id,
            tuple(token_ids),
            tuple(logprobs) if any(logprobs) else (),
            tuple(prompt_logprobs),
            tuple(failed),
            self._storage.step_done(),
            proposals=tuple(proposals) if any(proposals) else (),
        )

    def _fault_of(self, row: RowPlan, slot: FakeSlot, context: Sequence[int]) -> str | None:
        if slot.is_failed:
            return "a row before it failed"
        return self._fail_rows(row, context) if self._fail_rows is not None else None

    def _draw(self, row: RowPlan, slot: FakeSlot, context: Sequence[int]) -> tuple[int, ...]:
        """Draw behind the context, and behind each draft that is what was drawn before it."""
        if len(context) != len(slot.token_ids):
            raise CacheMismatch(f"slot {row.slot} samples before its last known token")
        sampled: list[int] = []
        for draft in (*row.draft_token_ids, None):
            sampled.append(self.next_token(slot))
            slot.append(sampled[-1:])
            if sampled[-1] != draft:
                break
            # The draft's place was written by this step: read it, as the next draw does.
            self._check_held(row, slot, len(slot.token_ids) - 1)
            if self._fail_rows is not None and self._fail_rows(row, slot.token_ids) is not None:
                break  # as a NaN behind the first token: the next step meets it again
        return tuple(sampled)

    def next_token(self, slot: FakeSlot) -> int:
        """Return what the model says behind a slot's tokens."""
        start = slot.start
        return self.model.next_token(
            slot.token_ids, start.num_prompt_tokens, start.sampling, start.choice_index
        )

    def _gather(self, row: RowPlan, slot: FakeSlot) -> list[int]:
        """Read the row's known context through the block table, and compare it with the tokens."""
        context: list[int] = []
        num_tokens = row.start + row.num_tokens - len(row.draft_token_ids)
        for position in range(num_tokens):
            self._check_held(row, slot, position)
            context.append(slot.token_ids[position])
        return context

    def _check_held(self, row: RowPlan, slot: FakeSlot, position: int) -> None:
        held = self._held(slot, position)
        if held != slot.cells[position]:
            raise CacheMismatch(
                f"slot {row.slot}, position {position}: block "
                f"{slot.block_table[position // self._size]} holds {held}, "
                f"expected token {slot.token_ids[position]}"
            )


class PipelinedFakeExecutor:
    """Holds two plans over a FakeExecutor, and computes each when it is told to, or has to.

    What was begun is computed by `compute`, one plan at a time, and at the latest by `finish`. So a
    test decides how far the device has come when the next plan is formed. State: the plans begun
    and not computed, and the outcomes that nobody has fetched.
    """

    def __init__(self, fake: FakeExecutor) -> None:
        """Let `fake` compute; what it is told to do, it does here too."""
        self.before_begin: Callable[[StepPlan], None] | None = None
        """Runs in each `begin` once its copies have begun; it may raise. A test sets it."""
        self._fake = fake
        self._begun: deque[StepPlan] = deque()
        self._outcomes: deque[StepResult | Exception] = deque()

    def __repr__(self) -> str:
        steps = [plan.step_id for plan in self._begun]
        return f"PipelinedFakeExecutor(begun={steps}, computed={len(self._outcomes)}, {self._fake})"

    @property
    def max_plans_in_flight(self) -> int:
        """How many plans it holds (PipelinedExecutor.max_plans_in_flight)."""
        return 2

    @property
    def num_begun(self) -> int:
        """Plans begun and not finished."""
        return len(self._begun) + len(self._outcomes)

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one step while nothing is begun (Executor.execute)."""
        if self.num_begun:
            raise CacheMismatch(f"step {plan.step_id} is executed while others are begun")
        return self._fake.execute(plan)

    def begin(self, plan: StepPlan) -> None:
        """Take a plan (PipelinedExecutor.begin)."""
        if self.num_begun >= self.max_plans_in_flight:
            raise CacheMismatch(f"step {plan.step_id} is one plan too many: {self}")
        self._fake.begin_copies(plan)
        if self.before_begin is not None:
            self.before_begin(plan)
        self._begun.append(plan)

    def compute(self) -> None:
        """Let the device compute the next plan, if there is one."""
        if self._begun:
            plan = self._begun.popleft()
            try:
                self._outcomes.append(self._fake.compute(plan))
            except Exception as error:  # it is `finish` that raises it
                self._outcomes.append(error)

    def finish(self) -> StepResult:
        """Return the oldest plan's result, or raise what it raised (PipelinedExecutor.finish)."""
        if not self._outcomes:
            self.compute()
        outcome = self._outcomes.popleft()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def _cell_after(before: Cell, token_id: int) -> Cell:
    """Return what a token leaves in the cache behind what stands before it."""
    return token_id, hash((before[1], token_id))


def fake_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """Return what the fake reports for a token: a function of the token alone."""
    logprob = -1.0 - token_id / 1024
    return TokenLogprobs(token_id, logprob, ((token_id, logprob),) if num_top else ())


def _prompt_entries(row: RowPlan, slot: FakeSlot) -> tuple[TokenLogprobs, ...]:
    """One entry for each position of the row that predicts a prompt token."""
    start = slot.start
    end = min(row.start + row.num_tokens, start.num_prompt_tokens - 1)
    num_top = start.sampling.num_prompt_logprobs or 0
    return tuple(
        fake_logprobs(slot.token_ids[position + 1], num_top) for position in range(row.start, end)
    )
