"""The batcher: takes requests, forms steps, applies results.

Owns the order in which the parts below are asked. Pure and synchronous: time comes in as `now`,
and effects are the engine's. Called from one thread. Does not know tensors, text, sockets or
threads.

    add ──▶ Admission ──▶ RequestQueue ──▶ RunningBatch ──▶ ended         RequestTable: who it is,
            (refuses)        ▲             (loads, runs)                  and what is told of it
                             └── preempted, load failed
    schedule: PlanFormer chooses ──▶ OpenPlans ──▶ update: results become tokens and events

While a plan is open, the blocks that it names are owned, whatever happens to their request; a
result for a request that ended meanwhile is dropped.
"""

from dataclasses import replace

from rillgate_server.config.groups import BatcherConfig, CacheConfig, SpeculationConfig
from rillgate_server.core.block_events import BlockDelta, TierHashes
from rillgate_server.core.block_hash import root_hash
from rillgate_server.core.load import EngineLoad, FlushedBlocks
from rillgate_server.core.model_spec import CacheSizes, ModelSpec
from rillgate_server.core.request import Rejection, RejectReason, Request, Speculation
from rillgate_server.core.step import CopyDone, RowPlan, StepOutput, StepPlan, StepResult
from rillgate_server.kvcache.block_table import BlockTable
from rillgate_server.kvcache.cost_model import CostModel, StepWork
from rillgate_server.kvcache.manager import KVCacheManager
from rillgate_server.kvcache.tier_plan import CachePolicy
from rillgate_server.scheduler.admission import Admission
from rillgate_server.scheduler.drafting import Drafter
from rillgate_server.scheduler.open_plans import OpenPlan, OpenPlans
from rillgate_server.scheduler.plan_former import PlanFormer
from rillgate_server.scheduler.request_queue import RequestQueue
from rillgate_server.scheduler.request_table import RequestTable
from rillgate_server.scheduler.running_batch import RunningBatch
from rillgate_server.scheduler.sequence import RequestGroup, Sequence, SequenceState

_NO_SPECULATION = SpeculationConfig()
STALE_COSTS_S = 10.0
"""Without a prefill; then one request is tried whatever its predicted time to the first token."""
Sampled = list[tuple[Sequence, int]]
"""Who has sampled in a step, and how many tokens."""


class Scheduler:
    """Continuous batching over one cache.

    State: the times of the latest progress and of the latest prefill; and what its parts own.
    """

    def __init__(
        self,
        batcher: BatcherConfig,
        cache: CacheConfig,
        spec: ModelSpec,
        sizes: CacheSizes,
        speculation: SpeculationConfig = _NO_SPECULATION,
    ) -> None:
        """Start idle over an empty cache of these sizes."""
        self._costs = CostModel()
        policy = CachePolicy(
            cache.block_size_tokens,
            sizes.block_bytes,
            root_hash(spec.version_digest, sizes.kv_dtype, cache.block_size_tokens),
            cache.prefix_caching,
            cache.load_policy,
        )
        self._cache = KVCacheManager(
            sizes.num_device_blocks, sizes.num_host_blocks, policy, self._costs
        )
        self._queue = RequestQueue(batcher.aging_s)
        self._batch = RunningBatch(self._cache, batcher.max_running)
        self._admission = Admission(
            batcher, spec, sizes, cache.block_size_tokens, self._queue, self._costs
        )
        self._requests = RequestTable(self._queue, self._batch, self._admission)
        self._drafter = Drafter(speculation, self._costs)
        self._open = OpenPlans(batcher.max_plans_in_flight)
        self._former = PlanFormer(batcher, self._batch, self._queue, self._drafter, self._open)
        self._longest_step = _longest_step(batcher, spec, sizes, cache.block_size_tokens)
        self._num_pageable_host_blocks = sizes.num_pageable_host_blocks
        self._progress_s = 0.0
        self._measured_s = 0.0

    def __repr__(self) -> str:
        return (
            f"Scheduler({self._former}, {self._requests}, {self._queue}, {self._batch}, "
            f"{self._open})"
        )

    @property
    def max_plans_in_flight(self) -> int:
        """Most plans that may be open; who has them computed may hold fewer."""
        return self._open.max_plans

    @property
    def has_work(self) -> bool:
        """Whether `schedule` or `take_events` has something to give, now or soon."""
        return bool(self._requests or self._requests.events or self._open) or (
            self._cache.has_copies_to_make(self._former.store_headroom_blocks)
        )

    def seconds_to_wait(self, now: float) -> float:
        """Return for how long nothing is to be done but to gather requests (micro-batch window)."""
        return 0.0 if self._open else self._former.gathering_s(now)

    # -- commands ---------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> Rejection | None:
        """Queue a request, or return why not: then nothing of it is kept."""
        if request.speculation is Speculation.DRAFT_MODEL and not self._drafter.has_draft_model:
            return Rejection(RejectReason.NO_DRAFT_MODEL, "there is no draft model here")
        group = RequestGroup(request)
        rejection = self._admission.refuse(
            group,
            now,
            self._cache.pool.num_available,
            self._batch_wait_s(),
            lambda: self._count_cached_tokens(request),
        )
        if rejection is not None:
            if not self._is_probe(request, rejection, now):
                return rejection
            self._measured_s = now  # the next one waits for what this one shows
        if not self._requests:
            self._progress_s = now
            self._former.forget_window()
        if request.deadline_s is not None:
            needed_s = self._admission.own_prefill_s(request)
            self._former.end_window_by(request.deadline_s - needed_s)
        self._requests.add(group, now)
        for sequence in group.sequences:
            sequence.drafts = self._drafter.open(request.speculation)
        return None

    def _is_probe(self, request: Request, rejection: Rejection, now: float) -> bool:
        """Whether to try what is predicted to be late: costs of long ago may be wrong by now.

        If everybody is refused, nobody measures them again.
        """
        return (
            rejection.reason is RejectReason.DEADLINE_NEVER
            and request.deadline_s is not None
            and request.deadline_s > now
            and now - self._measured_s >= STALE_COSTS_S
        )

    def abort(self, request_id: int, choice_indices: tuple[int, ...] = ()) -> None:
        """End some choices of a request, or all; nothing more is told of them.

        Their blocks are free at once, or after the last step under way that names them. Unknown ids
        are ignored: the request may have ended a moment ago.
        """
        self._requests.abort(request_id, choice_indices)

    def flush_cache(self) -> FlushedBlocks:
        """Forget every cached block that no request uses."""
        return FlushedBlocks(*self._cache.flush())

    def watch_blocks(self, *, is_on: bool) -> None:
        """Gather what comes into the cache and leaves it, for `take_block_changes`, or no more."""
        self._cache.index.watch(is_on=is_on)

    def cached_hashes(self) -> TierHashes:
        """Return what the cache holds now, by tier. Costs O(blocks)."""
        return self._cache.index.hashes()

    def take_block_changes(self) -> BlockDelta | None:
        """Return what has come into the cache or left it since the last call."""
        return self._cache.index.take_changes()

    def drain(self, *, undo: bool = False) -> None:
        """Refuse new requests, or take them on again; accepted ones run to their end."""
        self._admission.is_draining = not undo

    # -- the step ---------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        """Form the next step; None when there is nothing to do now, or not before a result.

        It may follow plans that are open, `max_plans_in_flight` in all. A plan without rows begins
        copies, or waits for some to end.
        """
        opened = None if self._open.is_full else self._former.form(now)
        if opened is None:
            return None
        self._open.add(opened)
        for sequence in opened.started:
            self._requests.note_started(sequence, now)
        return opened.plan

    def update(self, result: StepResult, now: float) -> StepOutput:
        """Apply the oldest plan's result; return everything that happened since the last output.

        Raises EngineFailure, and applies no more than the ends of copies, when the result does not
        fit the plan.
        """
        self.copies_done(result.finished_copies)  # first: they happened in any case
        opened = self._open.take_oldest(result)
        self._batch.plan_done(opened.rows)
        failed = {row.slot: row.message for row in result.failed_rows}
        for row, sequence in opened.rows:
            if row.slot in failed and sequence.state is SequenceState.RUNNING:
                # A NaN may come from its blocks: as hits they would fail whoever comes later.
                self._cache.forget(sequence.table)
                self._requests.fail(sequence.group, failed[row.slot])
        sampled = self._apply_rows(opened, result, now)
        # Last: whatever raises above, `fail_plan` still knows whom it concerns.
        seconds = self._open.applied(result.times, now)
        self._account(opened, sampled, result, seconds)
        if opened.work.num_prefill_tokens:
            self._measured_s = now
        self._progress_s = now
        return self._requests.events.take(self._open.done_step_id)

    def copies_done(self, finished: tuple[CopyDone, ...]) -> None:
        """Take in copies that ended, told by a result that is worth nothing else."""
        self._cache.copies_done(finished)

    def _account(
        self, opened: OpenPlan, sampled: Sampled, result: StepResult, seconds: float
    ) -> None:
        """Learn from the step what steps cost, and charge the tenants for it."""
        draft_s = result.times.draft_s
        self._costs.step_done(opened.work, seconds - draft_s)
        self._drafter.note_proposals(sum(map(len, result.proposals)), draft_s)
        holders = self._batch.sequences + self._batch.loading
        self._queue.charge_step(sampled, holders, seconds)

    def _apply_rows(self, opened: OpenPlan, result: StepResult, now: float) -> Sampled:
        """Walk over the rows; sampling rows take the result's entries in order.

        Return who has sampled how many tokens.
        """
        sampled: Sampled = []
        prompt_logprobs = dict(result.prompt_logprobs)  # slot -> entries
        num_sampled = 0
        for row, sequence in opened.rows:
            position = num_sampled
            num_sampled += row.samples
            if sequence.state is not SequenceState.RUNNING:
                continue  # ended meanwhile
            num_tokens = 0
            if row.samples:
                num_tokens = self._take_tokens(row, sequence, result, position)
                sampled.append((sequence, num_tokens))
            # Known tokens, and the accepted drafts: what is behind them is overwritten.
            sequence.take_computed(row, num_tokens)
            self._cache.commit(sequence.table, sequence.token_ids, sequence.num_computed)
            if sequence.group.held or sequence.group.prompt_logprobs is not None:
                self._requests.note_prefill(sequence, prompt_logprobs.get(row.slot, ()), now)
            if row.samples:
                self._requests.finish(sequence)
        return sampled

    def _take_tokens(
        self, row: RowPlan, sequence: Sequence, result: StepResult, position: int
    ) -> int:
        """Take in what a row sampled, the result's entry at `position`; return how much is kept."""
        token_ids = result.token_ids[position]
        if sequence.drafts is not None:
            self._drafter.note(sequence.drafts, len(row.draft_token_ids), len(token_ids) - 1)
            sequence.drafts.proposals = result.proposals[position] if result.proposals else ()
        logprobs = result.logprobs[position] if result.logprobs else ()
        return self._requests.append(sequence, token_ids, logprobs)

    def take_events(self) -> StepOutput | None:
        """Return what happened without a step, if anything did."""
        events = self._requests.events
        return events.take(self._open.done_step_id) if events else None

    def fail_plan(self, message: str, now: float) -> StepOutput:
        """End the requests of all open plans: of the oldest, whose result will never come, and of
        those behind it, whose rows hang on its tokens."""
        applying, plans = self._open.take_all(now)
        for opened in plans:
            self._batch.plan_done(opened.rows)
        failed = plans if applying is None else [applying, *plans]
        for opened in failed:
            for sequence in opened.sequences:
                if sequence.state is SequenceState.RUNNING:
                    self._requests.fail(sequence.group, message)
        self._batch.slots.plan_failed(slot for opened in failed for slot in opened.plan.ended_slots)
        self._progress_s = now
        return self._requests.events.take(self._open.done_step_id)

    def fail_all(self, message: str, now: float) -> StepOutput:
        """End every request: the engine stops."""
        self._requests.fail_all(message)
        return self.fail_plan(message, now)

    # -- the state of things ----------------------------------------------------------------------

    def load(self, now: float) -> EngineLoad:
        """Report the load. Costs O(running)."""
        running = self._batch.sequences
        num_prefilling_tokens = sum(s.num_remaining for s in running if s.num_remaining > 1)
        device, host = self._cache.tier_loads()
        num_here = len(running) + len(self._batch.loading)
        return EngineLoad(
            step_id=self._former.step_id,
            step_age_s=max(0.0, now - self._progress_s) if self._requests else 0.0,
            is_draining=self._admission.is_draining,
            num_running=len(running),
            num_loading=len(self._batch.loading),
            num_waiting=self._requests.num_choices - num_here,
            num_running_tokens=sum(sequence.num_computed for sequence in running),
            num_waiting_tokens=self._queue.num_tokens + num_prefilling_tokens,
            device=device,
            host=replace(host, num_blocks_pageable=self._num_pageable_host_blocks),
            copies=self._cache.copy_counts(),
            decisions=self._cache.decisions(),
            costs=self._costs.fitted(),
            queues=self._queue.loads(),
            prefill_tokens_per_s=self._costs.prefill_tokens_per_s,
            decode_step_s=self._costs.recent_decode_step_s,
            num_preemptions=self._batch.num_preemptions,
            num_drafted_tokens=self._drafter.num_drafted_tokens,
            num_accepted_tokens=self._drafter.num_accepted_tokens,
            num_cached_tokens=self._requests.num_cached_tokens,
            num_prompt_tokens=self._requests.num_prompt_tokens,
            free_device_fraction=self._cache.pool.num_available / self._cache.pool.num_blocks,
            longest_step_s=self._costs.step_s(self._longest_step),
            device_idle_s_per_step=self._open.device_idle_s,
            num_following_steps=self._open.num_following_steps,
        )

    def _batch_wait_s(self) -> float:
        """Predict when the batch takes on more: its prefills are computed, and a slot is free."""
        running, rate = self._batch.sequences, self._costs.prefill_tokens_per_s
        num_prefilling = sum(s.num_remaining for s in running if s.num_remaining > 1)
        wait_s = num_prefilling / rate if rate else 0.0
        if self._batch.has_free_slot or not running:
            return wait_s
        # The one with least to do is the first to end.
        num_steps = min(s.group.request.max_tokens - s.num_generated for s in running)
        return wait_s + num_steps * self._costs.recent_decode_step_s

    def _count_cached_tokens(self, request: Request) -> int:
        """Return how much of a request's leading choice is in the cache."""
        token_ids = (*request.prompt_token_ids, *request.choices[0].generated_token_ids)
        table = BlockTable(request.cache_salt, request.num_shared_prefix_tokens)
        return self._cache.count_cached_tokens(table, token_ids)

    def check_integrity(self) -> None:
        """Prove every part's invariants and those between them. Costs O(everything)."""
        self._queue.check_integrity()
        self._batch.check_integrity()
        self._requests.check_integrity()
        batch = self._batch
        self._open.check_integrity(batch.sequences + batch.loading + batch.closing)


def _longest_step(
    batcher: BatcherConfig, spec: ModelSpec, sizes: CacheSizes, block_size_tokens: int
) -> StepWork:
    """Return more than any step computes: all of it at the longest contexts that fit."""
    num_cached = sizes.num_device_blocks * block_size_tokens
    return StepWork(
        batcher.max_step_tokens,
        batcher.max_step_tokens * spec.max_context_tokens,
        batcher.max_running,
        min(num_cached, batcher.max_running * spec.max_context_tokens),
    )
