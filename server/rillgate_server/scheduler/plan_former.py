"""Which tokens the next step computes: the batcher's policy, on one screen.

Owns nothing but the order of choices made here; queue and batch own their state. Does not know
requests, events or results.

    a step's budget     | decode rows: 1 token each | prefill chunks, oldest first |
                        0                           ▲ at most max_prefill_chunk_tokens when
                                                      there are decode rows     max_step_tokens

Decode rows come first and there are never more than max_running <= max_step_tokens of them, so
every running stream gets a token in every step, whatever enters.
"""

from dataclasses import dataclass, field

from rillgate_server.config.groups import BatcherConfig
from rillgate_server.core.step import RowPlan, SlotStart, StepPlan
from rillgate_server.scheduler.request_queue import RequestQueue
from rillgate_server.scheduler.running_batch import RunningBatch
from rillgate_server.scheduler.sequence import Sequence, SequenceState


@dataclass(frozen=True, slots=True)
class OpenPlan:
    """A plan whose result is not there yet."""

    plan: StepPlan
    sequences: tuple[Sequence, ...]
    """One per row, in the plan's order."""
    admitted: tuple[tuple[Sequence, int], ...]
    """Those that start in this step, with the tokens found in the cache."""
    num_decode_rows: int
    num_prefill_tokens: int
    began_s: float


@dataclass(slots=True)
class _Draft:
    """A plan in the making."""

    rows: list[RowPlan] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    starts: list[SlotStart] = field(default_factory=list)
    admitted: list[tuple[Sequence, int]] = field(default_factory=list)
    num_decode_rows: int = 0
    num_prefill_tokens: int = 0


class PlanFormer:
    """Forms plans. State: the number of the latest one."""

    def __init__(self, config: BatcherConfig, batch: RunningBatch, queue: RequestQueue) -> None:
        """Take the batch and the queue that plans are formed from."""
        self.step_id = 0
        self._config = config
        self._batch = batch
        self._queue = queue

    def __repr__(self) -> str:
        return f"PlanFormer(step_id={self.step_id})"

    def form(self, now: float) -> OpenPlan | None:
        """Form the next step; None when nothing can be computed."""
        draft = _Draft()
        self._add_decodes(draft)
        budget = self._config.max_step_tokens - draft.num_decode_rows
        if draft.num_decode_rows:
            budget = min(budget, self._config.max_prefill_chunk_tokens)
        budget = self._add_prefills(draft, budget)
        self._admit(draft, budget)
        if not draft.rows:
            return None
        for sequence in draft.sequences:
            sequence.is_planned = True
        self.step_id += 1
        return OpenPlan(
            StepPlan(
                self.step_id,
                tuple(draft.starts),
                tuple(draft.rows),
                self._batch.slots.announce(),
            ),
            tuple(draft.sequences),
            tuple(draft.admitted),
            draft.num_decode_rows,
            draft.num_prefill_tokens,
            now,
        )

    def _add_decodes(self, draft: _Draft) -> None:
        """Give each decoding sequence its next position, oldest first."""
        try_grow = self._batch.cache.try_grow
        for sequence in tuple(self._batch.sequences):
            if sequence.state is not SequenceState.RUNNING or sequence.num_remaining != 1:
                continue
            num_tokens = len(sequence.token_ids)
            while (new_blocks := try_grow(sequence.table, num_tokens)) is None:
                # The last arrived goes: it has no row yet, for rows are made oldest first. The
                # oldest always gets its block, so somebody always finishes.
                victim = self._batch.preempt_last()
                self._queue.push(victim)
                if victim is sequence:
                    break
            if new_blocks is not None:
                draft.rows.append(RowPlan(sequence.slot, num_tokens - 1, 1, new_blocks))
                draft.sequences.append(sequence)
                draft.num_decode_rows += 1

    def _add_prefills(self, draft: _Draft, budget: int) -> int:
        """Continue the prefills that run, oldest first; return what is left of the budget."""
        for sequence in self._batch.sequences:
            if budget == 0:
                break
            if sequence.num_remaining > 1:
                budget -= self._add_chunk(draft, sequence, budget)
        return budget

    def _admit(self, draft: _Draft, budget: int) -> None:
        """Start those who wait, strictly in their order, while slots, blocks and budget last.

        A victim of this step stands at the head. It needs all of its blocks again and the headroom,
        so as a rule it waits until somebody has ended.
        """
        batch, queue = self._batch, self._queue
        while budget > 0 and queue and batch.has_free_slot:
            sequence = queue.head
            num_hit_tokens = batch.try_start(sequence)
            if num_hit_tokens is None:
                return
            queue.pop()
            draft.admitted.append((sequence, num_hit_tokens))
            draft.starts.append(
                SlotStart(
                    sequence.slot,
                    tuple(sequence.token_ids),
                    sequence.num_prompt_tokens,
                    tuple(sequence.table.blocks),
                    sequence.group.request.sampling,
                    sequence.choice_index,
                )
            )
            budget -= self._add_chunk(draft, sequence, budget)

    def _add_chunk(self, draft: _Draft, sequence: Sequence, budget: int) -> int:
        """Add as much of a prefill as the budget allows; return its tokens."""
        start, num_tokens = sequence.num_computed, min(sequence.num_remaining, budget)
        draft.rows.append(
            RowPlan(
                sequence.slot,
                start,
                num_tokens,
                samples=num_tokens == sequence.num_remaining,
                prompt_logprobs=sequence.gathers_prompt_logprobs
                and start < sequence.num_prompt_tokens - 1,
            )
        )
        draft.sequences.append(sequence)
        draft.num_prefill_tokens += num_tokens
        return num_tokens
