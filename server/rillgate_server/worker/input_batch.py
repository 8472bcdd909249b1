"""What the worker keeps per slot, and how a plan's rows become one packed step.

Owns slots: their tokens, block tables, and sampling state, from SlotStart to `ended_slots`. Does
not know who a slot belongs to, nor attention, nor logits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rillgate_server.core.step import RowPlan, SlotStart, StepPlan
from rillgate_server.errors import EngineFailure
from rillgate_server.worker.attention.base import PackedRow, PackedStep
from rillgate_server.worker.gpu.step_arrays import UNKNOWN, Run, StepArrays
from rillgate_server.worker.slot_sampling import SlotSampling

_MIN_TABLE_BLOCKS = 64
"""Width of the first block tables; they double when a slot needs more."""


_LOGPROB_POSITIONS = 128
"""Prompt positions whose logits exist at a time: 128 x 150,000 float32 are 77 MB."""


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Tokens at positions of one slot that follow one another."""

    start: int
    """Position of the first."""
    token_ids: list[int]
    """At least one."""
    block_table: Tensor
    """As in PackedRow."""


@dataclass(slots=True)
class SlotState:
    """One slot."""

    token_ids: list[int]
    """All tokens known: prompt, replayed, sampled."""
    num_prompt_tokens: int
    num_blocks: int
    """Filled entries of its block table."""
    sampling: SlotSampling
    num_pending: int = 0
    """Tokens behind these that were drawn on the device and are not known here yet."""

    def append(self, token_id: int) -> None:
        """Note a sampled token."""
        self.token_ids.append(token_id)
        self.sampling.append(token_id)

    def prompt_parts(self, row: RowPlan, hidden: Tensor) -> Iterator[tuple[Tensor, list[int]]]:
        """Give the states of a row that speak of prompt tokens, with those tokens, in parts.

        The logits at position p speak of the token at p + 1: a chunk covers what its own positions
        predict, so the chunk that ends at p needs the first token of the next one, and the last
        prompt position speaks of no prompt token. hidden: [row.num_tokens, hidden_size].
        """
        end = min(row.start + row.num_tokens + 1, self.num_prompt_tokens)
        following = self.token_ids[row.start + 1 : end]
        for i in range(0, len(following), _LOGPROB_POSITIONS):
            token_ids = following[i : i + _LOGPROB_POSITIONS]
            yield hidden[i : i + len(token_ids)], token_ids


class InputBatch:
    """The slots and the packing.

    State: `_slots`, and `_tables`: one row per slot number, whose entries past the slot's blocks
    hold its first block (gathers may overshoot, see PackedRow).
    """

    def __init__(
        self, block_size_tokens: int, num_blocks: int, vocab_size: int, *, draws: bool = True
    ) -> None:
        """Start without slots; `num_blocks` is the pool's size, for checks.

        `draws`: tokens are drawn on the host, from what its slots have said.
        """
        self._draws = draws
        self._block_size = block_size_tokens
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size
        self._slots: dict[int, SlotState] = {}  # slot -> state
        self._tables = torch.zeros(0, _MIN_TABLE_BLOCKS, dtype=torch.int64)

    def __repr__(self) -> str:
        """Show how many slots there are."""
        return f"InputBatch(num_slots={len(self._slots)}, tables={tuple(self._tables.shape)})"

    def slot(self, slot: int) -> SlotState:
        """Return a slot's state."""
        if slot not in self._slots:
            raise EngineFailure(f"slot {slot} has not been started")
        return self._slots[slot]

    def apply(self, plan: StepPlan) -> list[int]:
        """End and start slots, extend block tables; return the blocks that are filled anew.

        A started slot's blocks before its row's start hold cached tokens and keep them.
        """
        for slot in plan.ended_slots:
            self._slots.pop(slot, None)
        fresh: list[int] = []
        starts = {row.slot: row.start for row in plan.rows}
        for start in plan.starts:
            self._start(start)
            num_cached = -(-starts.get(start.slot, 0) // self._block_size)
            fresh.extend(start.block_table[num_cached:])
        for row in plan.rows:
            self._extend(row.slot, row.new_blocks)
            fresh.extend(row.new_blocks)
        return fresh

    def pack(self, rows: Sequence[RowPlan]) -> PackedStep:
        """Lay all rows' tokens behind one another.

        Each draft is a row of its own, over the same blocks: the attention computes it as the
        decode row that it would be without speculation, so it gets the same numbers.
        """
        runs: list[TokenRun] = []
        for row in rows:
            state = self.slot(row.slot)
            end = row.start + row.num_tokens
            self._check(row, state, end)
            table = self._tables[row.slot]
            num_known = row.num_tokens - len(row.draft_token_ids)
            known_end = row.start + num_known
            runs.append(TokenRun(row.start, state.token_ids[row.start : known_end], table))
            runs.extend(
                TokenRun(position, [draft], table)
                for position, draft in enumerate(row.draft_token_ids, known_end)
            )
        return pack_runs(runs, self._block_size)

    def arrays(self, rows: Sequence[RowPlan]) -> StepArrays:
        """Lay all rows' tokens behind one another, as `pack` does, for a GPU.

        Tokens that are pending are UNKNOWN.
        """
        tables = self._tables.numpy()
        runs: list[Run] = []
        for row in rows:
            state, table = self.slot(row.slot), tables[row.slot]
            end = row.start + row.num_tokens
            self._check(row, state, end)
            known_end = end - len(row.draft_token_ids)
            token_ids = state.token_ids[row.start : known_end]
            token_ids += [UNKNOWN] * (known_end - row.start - len(token_ids))
            runs.append(Run(row.slot, row.start, token_ids, table))
            runs.extend(
                Run(row.slot, position, (draft,), table)
                for position, draft in enumerate(row.draft_token_ids, known_end)
            )
        return StepArrays.of(runs, self._block_size)

    def block_table(self, slot: int) -> Tensor:
        """Return a slot's block table, as PackedRow has it."""
        return self._tables[slot]

    def _start(self, start: SlotStart) -> None:
        if start.slot in self._slots:
            raise EngineFailure(f"slot {start.slot} is started but has not ended")
        self._slots[start.slot] = SlotState(
            list(start.token_ids),
            start.num_prompt_tokens,
            0,
            SlotSampling.start(start, self._vocab_size, keeps_history=self._draws),
        )
        self._extend(start.slot, start.block_table)

    def _extend(self, slot: int, blocks: tuple[int, ...]) -> None:
        """Append to a slot's block table."""
        if not blocks:
            return
        if not all(0 <= block < self._num_blocks for block in blocks):
            raise EngineFailure(f"slot {slot} got blocks {blocks}; there are {self._num_blocks}")
        state = self.slot(slot)
        first, last = state.num_blocks, state.num_blocks + len(blocks)
        self._reserve(slot + 1, last)
        table = self._tables[slot]
        if first == 0:
            table.fill_(blocks[0])
        table[first:last] = torch.tensor(blocks)
        state.num_blocks = last

    def _reserve(self, num_slots: int, num_blocks: int) -> None:
        """Grow the tables; amortised, so that a decode step allocates nothing here."""
        rows, columns = self._tables.shape
        if num_slots <= rows and num_blocks <= columns:
            return
        while columns < num_blocks:
            columns *= 2
        grown = torch.zeros(max(rows, 2 * num_slots), columns, dtype=torch.int64)
        if rows:
            grown[:rows] = self._tables[:, :1]
            grown[:rows, : self._tables.shape[1]] = self._tables
        self._tables = grown

    def _check(self, row: RowPlan, state: SlotState, end: int) -> None:
        """Refuse a row that names what is not there: a wrong plan must not read others' memory."""
        num_drafts, num_known = len(row.draft_token_ids), len(state.token_ids) + state.num_pending
        known_end = end - num_drafts
        if row.start < 0 or known_end <= row.start or known_end > num_known:
            raise EngineFailure(
                f"slot {row.slot} was asked for positions {row.start} to {end}, "
                f"it has {num_known} tokens and {num_drafts} drafts"
            )
        if num_drafts and not (
            row.samples
            and known_end == num_known
            and all(0 <= draft < self._vocab_size for draft in row.draft_token_ids)
        ):
            raise EngineFailure(
                f"slot {row.slot} has {num_known} tokens; its drafts fit not: {row}"
            )
        if end > state.num_blocks * self._block_size:
            raise EngineFailure(
                f"slot {row.slot} was asked for positions up to {end}, its {state.num_blocks} "
                f"blocks hold {state.num_blocks * self._block_size}"
            )


def pack_runs(runs: Sequence[TokenRun], block_size_tokens: int) -> PackedStep:
    """Lay runs behind one another, each a row."""
    token_ids: list[int] = []
    positions: list[int] = []
    blocks: list[Tensor] = []
    packed: list[PackedRow] = []
    for run in runs:
        end = run.start + len(run.token_ids)
        packed.append(PackedRow(len(token_ids), run.start, len(run.token_ids), run.block_table))
        token_ids.extend(run.token_ids)
        positions.extend(range(run.start, end))
        blocks.append(_blocks_of(run.block_table, run.start, end, block_size_tokens))
    at = torch.tensor(positions)
    return PackedStep(
        torch.tensor(token_ids), at, (torch.cat(blocks), at % block_size_tokens), tuple(packed)
    )


def _blocks_of(table: Tensor, start: int, end: int, block_size: int) -> Tensor:
    """Return the block of each position in [start, end). [end - start], int64."""
    if end - start == 1:
        return table[start // block_size : start // block_size + 1]
    first = start // block_size
    repeated = table[first : -(-end // block_size)].repeat_interleave(block_size)
    return repeated[start - first * block_size : end - first * block_size]
