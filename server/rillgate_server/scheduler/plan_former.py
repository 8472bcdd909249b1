"""Which tokens the next step computes: the batcher's policy, on one screen.

Owns nothing but the order of choices made here; queue and batch own their state. Does not know
requests, events or results.

    a step's budget   | decode rows: 1 token each | drafts | prefill chunks, highest rank first |
                      0                                    ▲ at most max_prefill_chunk_tokens when
                                                             there are decode rows  max_step_tokens

Decode rows come first and there are never more than max_running <= max_step_tokens of them, so
every running stream gets a token in every step, whatever enters. Drafts take at most half of what
they leave, and only blocks that nobody needs to grow: they delay nobody's start for long, and
nobody is preempted for a guess.

While plans are open the next one goes on from where they end, in positions alone. None is formed
that would need their results: for tokens to draft behind, or for blocks, since nothing is taken
from a sequence that an open plan names. The rejected alternative, to leave such sequences out,
splits a batch into halves that take turns, and a step of half the rows takes as long.
"""

import math
from dataclasses import dataclass, field, replace

from rillgate_server.config.groups import BatcherConfig
from rillgate_server.core.step import RowPlan, SlotStart, StepPlan
from rillgate_server.kvcache.cost_model import StepWork
from rillgate_server.scheduler.drafting import BatchCost, Drafter
from rillgate_server.scheduler.open_plans import OpenPlan, OpenPlans
from rillgate_server.scheduler.request_queue import RequestQueue
from rillgate_server.scheduler.running_batch import RunningBatch
from rillgate_server.scheduler.sequence import Sequence, SequenceState

_STORE_STEPS = 2
"""Steps that a store takes, about: growth of so many steps is kept out of its way."""


@dataclass(slots=True)
class _Sketch:
    """A plan in the making."""

    rows: list[RowPlan] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    starts: list[SlotStart] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)
    num_decode_rows: int = 0
    num_decode_context: int = 0
    num_prefill_tokens: int = 0
    num_prefill_context: int = 0

    def add_decode(self, row: RowPlan, sequence: Sequence) -> None:
        """Add a decode row; each draft costs what a row costs."""
        self.rows.append(row)
        self.sequences.append(sequence)
        first = row.start + 1
        self.num_decode_rows += row.num_tokens
        self.num_decode_context += sum(range(first, first + row.num_tokens))

    @property
    def work(self) -> StepWork:
        """What the step computes."""
        return StepWork(
            self.num_prefill_tokens,
            self.num_prefill_context,
            self.num_decode_rows,
            self.num_decode_context,
        )


class PlanFormer:
    """Forms plans.

    State: the number of the latest one, and of its drafts; since when an idle batch gathers, and
    when it must end to.
    """

    def __init__(
        self,
        config: BatcherConfig,
        batch: RunningBatch,
        queue: RequestQueue,
        drafter: Drafter,
        open_plans: OpenPlans,
    ) -> None:
        """Take the batch and the queue that plans are formed from, who makes drafts, and the plans
        that the next one follows."""
        self.step_id = 0
        self._config = config
        self._batch = batch
        self._queue = queue
        self._drafter = drafter
        self._open = open_plans
        self._num_drafts = 0  # of the latest plan
        self._gathering_since_s: float | None = None
        self._latest_start_s = math.inf

    def __repr__(self) -> str:
        return f"PlanFormer(step_id={self.step_id}, gathering_since={self._gathering_since_s})"

    @property
    def store_headroom_blocks(self) -> int:
        """Blocks that running sequences take while a store runs; on average, and one more."""
        num_running = len(self._batch.sequences)
        size = self._batch.cache.block_size_tokens
        num_tokens = (num_running + self._num_drafts) * _STORE_STEPS
        return num_running and 1 + -(-num_tokens // size)

    def form(self, now: float) -> OpenPlan | None:
        """Form the next step; None when nothing can be computed or copied, or is to wait.

        The plan is not among the open ones yet.
        """
        if self._open and self._needs_results():
            return None
        batch, sketch = self._batch, _Sketch()
        is_following = bool(self._open or batch.sequences)
        for broken in batch.take_broken():
            self._queue.push(broken, now)
            self.end_window_by(now)  # it has waited once
        self._add_decodes(sketch, now)
        budget = self._config.max_step_tokens - sketch.num_decode_rows
        if sketch.num_decode_rows:
            budget = min(budget, self._config.max_prefill_chunk_tokens)
        budget = self._add_loaded(sketch, budget)
        budget = self._add_prefills(sketch, budget)
        if not self.gathering_s(now):
            self._admit(sketch, budget, now)
        batch.cache.plan_stores(self.store_headroom_blocks)
        # Copies alone wait for the open plans: a plan without rows may take as long as a copy.
        if not sketch.rows and (self._open or not batch.cache.has_copies):
            return None
        for row, sequence in zip(sketch.rows, sketch.sequences, strict=True):
            sequence.plan_row(row)
        self.step_id += 1
        plan = StepPlan(
            self.step_id,
            tuple(sketch.starts),
            tuple(sketch.rows),
            batch.slots.announce(),
            batch.cache.take_copies(),
        )
        sequences, started = tuple(sketch.sequences), tuple(sketch.started)
        return OpenPlan(plan, sequences, started, sketch.work, now, is_following)

    def _needs_results(self) -> bool:
        """Whether the plan after the open ones must wait for what comes of them."""
        if not self._open.newest.plan.rows:
            return True  # it waits for a copy; whoever comes meanwhile may need its blocks
        cache, num_new = self._batch.cache, 0
        for sequence in self._batch.sequences:
            if sequence.drafts is not None and sequence.num_plans:
                return True
            if sequence.can_decode:
                num_blocks = cache.num_blocks_for(sequence.num_planned + 1)
                num_new += max(0, num_blocks - len(sequence.table.blocks))
        return num_new > cache.pool.num_available

    def forget_window(self) -> None:
        """Note that work comes to an idle replica: whatever window there was is over.

        Nobody asks for a plan while there is no work, so nobody has seen it end.
        """
        self._gathering_since_s, self._latest_start_s = None, math.inf

    def end_window_by(self, latest_s: float) -> None:
        """Let the window that is open, or opens next, end by then: somebody cannot wait longer."""
        self._latest_start_s = min(self._latest_start_s, latest_s)

    def gathering_s(self, now: float) -> float:
        """Return how long the idle batch still waits for more requests (the micro-batch window)."""
        config, batch = self._config, self._batch
        is_idle = not (batch.sequences or batch.loading)
        if not (config.max_queue_delay_ms and is_idle and self._queue):
            self.forget_window()
            return 0.0
        if self._gathering_since_s is None:
            self._gathering_since_s = now
        if len(self._queue) >= config.preferred_batch_size:
            return 0.0
        end_s = self._gathering_since_s + config.max_queue_delay_ms / 1e3
        return max(0.0, min(end_s, self._latest_start_s) - now)

    def _add_decodes(self, sketch: _Sketch, now: float) -> None:
        """Give each decoding sequence its next position, those of the highest rank first."""
        batch, try_grow = self._batch, self._batch.cache.try_grow
        decoding: list[tuple[Sequence, tuple[int, ...]]] = []
        for sequence in tuple(batch.sequences):
            if sequence.state is not SequenceState.RUNNING or not sequence.can_decode:
                continue
            num_tokens = sequence.num_planned + 1
            while (new_blocks := try_grow(sequence.table, num_tokens)) is None:
                position = batch.sequences.index(sequence)
                if position == len(batch.sequences) - 1 and batch.cache.has_copies:
                    break  # it waits: a copy's end frees blocks, or lets somebody run who must go
                # Those behind it have no row yet. The first of all never goes before the others,
                # so somebody always finishes.
                victim = batch.preempt_behind(position)
                self._queue.push(victim, now)
                if victim is sequence:
                    break
            if new_blocks is not None:
                decoding.append((sequence, new_blocks))
        costs = BatchCost(len(decoding), sum(s.num_planned + 1 for s, _ in decoding))
        budget = (self._config.max_step_tokens - len(decoding)) // 2
        for sequence, new_blocks in decoding:
            row = RowPlan(sequence.slot, sequence.num_planned, 1, new_blocks)
            if sequence.drafts is not None:
                row = self._with_drafts(row, sequence, budget, costs)
                budget -= len(row.draft_token_ids)
            sketch.add_decode(row, sequence)
        self._num_drafts = sketch.num_decode_rows - len(decoding)

    def _with_drafts(
        self, row: RowPlan, sequence: Sequence, budget: int, costs: BatchCost
    ) -> RowPlan:
        """Add drafts to a decode row, as far as budget and blocks reach."""
        assert sequence.drafts is not None
        assert not sequence.num_plans, sequence  # all of its tokens are known
        cache, drafter, num_known = self._batch.cache, self._drafter, len(sequence.token_ids)
        num_left = sequence.group.request.max_tokens - sequence.num_generated
        most = min(num_left - 1, budget)  # the step gives a token more than its drafts
        drafts = drafter.choose(sequence.drafts, sequence.token_ids, most, costs)
        num_proposals = drafter.num_proposals(sequence.drafts, num_left - 2, costs)
        # The draft model writes its proposals but the last into the same blocks.
        asked = num_known + len(drafts) + num_proposals
        new_blocks = cache.try_grow(sequence.table, asked, len(self._batch.sequences))
        if new_blocks is None:
            new_blocks = ()
            num_room = len(sequence.table.blocks) * cache.block_size_tokens - num_known
            drafts = drafts[:num_room]
        return replace(
            row,
            num_tokens=1 + len(drafts),
            new_blocks=row.new_blocks + new_blocks,
            draft_token_ids=drafts,
            num_proposals=num_proposals,
        )

    def _add_loaded(self, sketch: _Sketch, budget: int) -> int:
        """Start those whose blocks have arrived: little is left to compute of them, as a rule."""
        while budget > 0 and (sequence := self._batch.run_loaded()) is not None:
            budget -= self._start(sketch, sequence, budget)
        return budget

    def _add_prefills(self, sketch: _Sketch, budget: int) -> int:
        """Continue the prefills that run; return what is left of the budget."""
        just_started = set(map(id, sketch.started))
        for sequence in self._batch.sequences:
            if budget == 0:
                break
            if sequence.num_unplanned > 1 and id(sequence) not in just_started:
                budget -= self._add_chunk(sketch, sequence, budget)
        return budget

    def _admit(self, sketch: _Sketch, budget: int, now: float) -> None:
        """Start those who wait, strictly in the queue's order, while slots, blocks, budget last.

        A victim of this step stands at the head of its class. It needs all of its blocks again and
        the headroom, so as a rule it waits until somebody has ended. Who has to load takes a slot
        and blocks now, and of a budget later.
        """
        batch, queue = self._batch, self._queue
        while budget > 0 and queue and batch.has_free_slot:
            sequence = queue.head(now)
            if not batch.try_start(sequence, len(queue) - 1):
                return
            taken = queue.pop(now)
            assert taken is sequence, (taken, sequence)
            if sequence.state is SequenceState.RUNNING:
                budget -= self._start(sketch, sequence, budget)

    def _start(self, sketch: _Sketch, sequence: Sequence, budget: int) -> int:
        """Set up a slot, and add the first chunk; return its tokens."""
        self._queue.started(sequence, sequence.num_remaining)
        sketch.started.append(sequence)
        sketch.starts.append(
            SlotStart(
                sequence.slot,
                tuple(sequence.token_ids),
                sequence.num_prompt_tokens,
                tuple(sequence.table.blocks),
                sequence.group.request.sampling,
                sequence.choice_index,
            )
        )
        return self._add_chunk(sketch, sequence, budget)

    def _add_chunk(self, sketch: _Sketch, sequence: Sequence, budget: int) -> int:
        """Add as much of a prefill as the budget allows; return its tokens."""
        start, num_tokens = sequence.num_planned, min(sequence.num_unplanned, budget)
        sketch.rows.append(
            RowPlan(
                sequence.slot,
                start,
                num_tokens,
                samples=num_tokens == sequence.num_unplanned,
                prompt_logprobs=sequence.gathers_prompt_logprobs
                and start < sequence.num_prompt_tokens - 1,
            )
        )
        sketch.sequences.append(sequence)
        sketch.num_prefill_tokens += num_tokens
        sketch.num_prefill_context += num_tokens * start + num_tokens * (num_tokens + 1) // 2
        return num_tokens
