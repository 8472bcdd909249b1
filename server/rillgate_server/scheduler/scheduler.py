"""The batcher: takes requests, forms steps, applies results.

Owns every request from `add` to its last event. Pure and synchronous: time comes in as `now`, and
effects are the engine's. Called from one thread. Does not know tensors, text, sockets or threads.

    add ──▶ Admission ──▶ RequestQueue ──▶ RunningBatch ──▶ ended
            (refuses)        ▲                 │
                             └── preempted ────┘
    schedule: PlanFormer chooses     update: results become tokens and events

At most one plan is open. While it is, the blocks that it names are owned, whatever happens to
their request; a result for a request that ended meanwhile is dropped.
"""

from rillgate_server.config.groups import BatcherConfig, CacheConfig
from rillgate_server.core.block_hash import root_hash
from rillgate_server.core.load import EngineLoad, TierLoad
from rillgate_server.core.model_spec import ModelSpec
from rillgate_server.core.request import FinishReason, Rejection, Request
from rillgate_server.core.step import (
    ChoiceFinished,
    ChoiceTokens,
    PromptLogprobs,
    RequestFailed,
    RequestStarted,
    StepOutput,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from rillgate_server.errors import EngineFailure
from rillgate_server.kvcache.manager import KVCacheManager
from rillgate_server.scheduler.admission import Admission
from rillgate_server.scheduler.plan_former import OpenPlan, PlanFormer
from rillgate_server.scheduler.rates import MeasuredRates
from rillgate_server.scheduler.request_queue import RequestQueue
from rillgate_server.scheduler.running_batch import RunningBatch
from rillgate_server.scheduler.sequence import RequestGroup, Sequence, SequenceState
from rillgate_server.scheduler.step_events import StepEvents


class Scheduler:
    """Continuous batching over one cache.

    State: the requests that have not ended, the open plan, the events that no output has carried,
    the time of the latest progress, counters since the start; and what queue, batch, admission
    and rates own.
    """

    def __init__(
        self, batcher: BatcherConfig, cache: CacheConfig, spec: ModelSpec, num_blocks: int
    ) -> None:
        """Start idle over a cache of `num_blocks` empty blocks."""
        manager = KVCacheManager(
            num_blocks,
            cache.block_size_tokens,
            root_hash(spec.version_digest, spec.dtype, cache.block_size_tokens),
            prefix_caching=cache.prefix_caching,
        )
        self._groups: dict[int, RequestGroup] = {}  # request id -> its choices
        self._queue = RequestQueue()
        self._batch = RunningBatch(manager, batcher.max_running)
        self._former = PlanFormer(batcher, self._batch, self._queue)
        self._admission = Admission(batcher, spec, num_blocks, cache.block_size_tokens)
        self._rates = MeasuredRates()
        self._open: OpenPlan | None = None
        self._events = StepEvents()
        self._num_added = 0
        self._num_choices = 0  # that have not ended
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._progress_s = 0.0

    def __repr__(self) -> str:
        return (
            f"Scheduler(step_id={self._former.step_id}, requests={len(self._groups)}, "
            f"{self._queue}, {self._batch}, open={self._open is not None})"
        )

    @property
    def has_work(self) -> bool:
        """Whether `schedule` or `take_events` has something to give."""
        return bool(self._groups or self._events or self._open)

    # -- commands ---------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> Rejection | None:
        """Queue a request, or return why not: then nothing of it is kept."""
        assert request.request_id not in self._groups, "request ids are unique"
        group = RequestGroup(request)
        rejection = (
            self._admission.refuse_invalid(request)
            or self._admission.refuse_too_many_blocks(request, self._batch.cache.pool.num_available)
            or self._admission.refuse_now(group, self._rates, self._slot_wait_s())
        )
        if rejection is not None:
            return rejection
        if not self._groups:
            self._progress_s = now
        self._num_added += 1
        self._groups[request.request_id] = group
        self._admission.entered(group)
        for position, choice in enumerate(request.choices):
            sequence = Sequence(group, choice, (self._num_added, position))
            reason = _finish_reason(sequence)
            if reason is None:
                group.sequences.append(sequence)
            else:
                group.early_finished.append(_finished(sequence, reason))
        group.held = list(group.sequences)
        self._num_choices += len(group.sequences)
        if not group.sequences:
            self._note_started(group, 0, now)
            self._close(group)
        else:
            self._lead(group)
        return None

    def abort(self, request_id: int, choice_indices: tuple[int, ...] = ()) -> None:
        """End some choices of a request, or all; nothing more is told of them.

        Their blocks are free at once, or after the step under way. Unknown ids are ignored: the
        request may have ended a moment ago.
        """
        group = self._groups.get(request_id)
        if group is not None:
            group.early_finished = [
                finished
                for finished in group.early_finished
                if choice_indices and finished.choice_index not in choice_indices
            ]
            for sequence in tuple(group.sequences):
                if not choice_indices or sequence.choice_index in choice_indices:
                    self._end(sequence)
        self._events.forget(request_id, choice_indices)

    def drain(self) -> None:
        """Refuse new requests; those that were accepted run to their end."""
        self._admission.is_draining = True

    # -- the step ---------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepPlan | None:
        """Form the next step; None while a plan is open or when nothing is to be computed."""
        if self._open is not None:
            return None
        self._open = self._former.form(now)
        if self._open is None:
            return None
        for sequence, num_hit_tokens in self._open.admitted:
            if not sequence.group.is_started:
                self._note_started(sequence.group, num_hit_tokens, now)
            if sequence.gathers_prompt_logprobs:
                sequence.group.prompt_logprobs = []  # a preemption may have lost the first part
        return self._open.plan

    def update(self, result: StepResult, now: float) -> StepOutput:
        """Apply the result of the open plan; return everything that happened since the last output.

        Raises EngineFailure, and changes nothing, when the result does not fit the plan.
        """
        opened = self._open
        assert opened is not None, "no plan is open"
        _check_result(opened, result)
        self._batch.plan_done(opened.sequences)
        failed = {row.slot: row.message for row in result.failed_rows}
        for row, sequence in zip(opened.plan.rows, opened.sequences, strict=True):
            if row.slot in failed and sequence.state is SequenceState.RUNNING:
                self._fail(sequence.group, failed[row.slot])
        self._apply_rows(opened, result)
        self._open = None  # last: whatever raises above, `fail_plan` still knows whom it concerns
        self._progress_s = now
        self._rates.step_done(
            opened.num_prefill_tokens, opened.num_decode_rows, now - opened.began_s
        )
        return self._events.take(self._former.step_id)

    def take_events(self) -> StepOutput | None:
        """Return what happened without a step, if anything did."""
        return self._events.take(self._former.step_id) if self._events else None

    def fail_plan(self, message: str, now: float) -> StepOutput:
        """End the requests of the open plan, whose result will never come."""
        opened, self._open = self._open, None
        if opened is not None:
            self._batch.plan_done(opened.sequences)
            for sequence in opened.sequences:
                if sequence.state is SequenceState.RUNNING:
                    self._fail(sequence.group, message)
            self._batch.slots.plan_failed()
        self._progress_s = now
        return self._events.take(self._former.step_id)

    def fail_all(self, message: str, now: float) -> StepOutput:
        """End every request: the engine stops."""
        for group in tuple(self._groups.values()):
            self._fail(group, message)
        return self.fail_plan(message, now)

    def load(self, now: float) -> EngineLoad:
        """Report the load. Costs O(running)."""
        pool = self._batch.cache.pool
        running = self._batch.sequences
        num_prefilling_tokens = sum(s.num_remaining for s in running if s.num_remaining > 1)
        return EngineLoad(
            step_id=self._former.step_id,
            step_age_s=max(0.0, now - self._progress_s) if self._groups else 0.0,
            is_draining=self._admission.is_draining,
            num_running=len(running),
            num_waiting=self._num_choices - len(running),
            num_running_tokens=sum(sequence.num_computed for sequence in running),
            num_waiting_tokens=self._queue.num_tokens + num_prefilling_tokens,
            device=TierLoad(pool.num_blocks, pool.num_free, pool.num_used, pool.num_cached),
            prefill_tokens_per_s=self._rates.prefill_tokens_per_s,
            decode_step_s=self._rates.decode_step_s,
            num_preemptions=self._batch.num_preemptions,
            num_cached_tokens=self._num_cached_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
        )

    # -- applying a result ------------------------------------------------------------------------

    def _apply_rows(self, opened: OpenPlan, result: StepResult) -> None:
        """Walk over the rows; sampling rows take the result's entries in order."""
        prompt_logprobs = dict(result.prompt_logprobs)  # slot -> entries
        num_sampled = 0
        for row, sequence in zip(opened.plan.rows, opened.sequences, strict=True):
            position = num_sampled
            num_sampled += row.samples
            if sequence.state is not SequenceState.RUNNING:
                continue  # ended meanwhile
            sequence.num_computed += row.num_tokens
            self._batch.cache.commit(sequence.table, sequence.token_ids, sequence.num_computed)
            if sequence.group.held or sequence.group.prompt_logprobs is not None:
                self._note_prefill(sequence, prompt_logprobs.get(row.slot, ()))
            if row.samples:
                logprobs = result.logprobs[position] if result.logprobs else None
                self._append(sequence, result.token_ids[position], logprobs)

    def _note_prefill(self, sequence: Sequence, entries: tuple[TokenLogprobs, ...]) -> None:
        """Gather the prompt's log-probabilities; let the other choices go once it is computed."""
        group = sequence.group
        if sequence.gathers_prompt_logprobs and group.prompt_logprobs is not None:
            group.prompt_logprobs += entries
            if sequence.is_prompt_computed:
                gathered = tuple(group.prompt_logprobs)
                self._events.prompt_logprobs.append(
                    PromptLogprobs(group.request.request_id, gathered)
                )
                group.prompt_logprobs = None
        if group.held and group.leader is sequence and sequence.is_prompt_computed:
            for follower in group.held:
                self._queue.push(follower)
            group.held.clear()

    def _append(
        self, sequence: Sequence, token_ids: tuple[int, ...], logprobs: TokenLogprobs | None
    ) -> None:
        """Take in a sampled token, and end the choice if it does."""
        self._events.tokens.append(
            ChoiceTokens(
                sequence.group.request.request_id,
                sequence.choice_index,
                len(sequence.token_ids) - sequence.num_prompt_tokens,
                token_ids,
                () if logprobs is None else (logprobs,),
            )
        )
        sequence.token_ids += token_ids
        reason = _finish_reason(sequence)
        if reason is not None:
            self._events.finished.append(_finished(sequence, reason))
            self._end(sequence)

    # -- requests' lives --------------------------------------------------------------------------

    def _lead(self, group: RequestGroup) -> None:
        """Let the first choice that is held compute the prompt for the others."""
        group.leader = group.held.pop(0)
        self._queue.push(group.leader)

    def _note_started(self, group: RequestGroup, num_hit_tokens: int, now: float) -> None:
        """Tell that a request left the queue."""
        request = group.request
        num_cached_tokens = min(num_hit_tokens, len(request.prompt_token_ids))
        group.is_started = True
        self._admission.left(group)
        self._num_prompt_tokens += len(request.prompt_token_ids)
        self._num_cached_tokens += num_cached_tokens
        self._events.started.append(
            RequestStarted(request.request_id, max(0.0, now - request.arrival_s), num_cached_tokens)
        )
        self._events.finished += group.early_finished

    def _fail(self, group: RequestGroup, message: str) -> None:
        """End a request by a fault; nothing follows for any of its choices."""
        self._events.failed.append(RequestFailed(group.request.request_id, message))
        group.held.clear()
        group.early_finished.clear()
        for sequence in tuple(group.sequences):
            self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        """End one choice, wherever it is; with the last one its request is gone."""
        group = sequence.group
        group.sequences.remove(sequence)
        self._num_choices -= 1
        if sequence.state is SequenceState.RUNNING:
            self._batch.end(sequence)
        elif sequence.state is SequenceState.WAITING:
            self._queue.remove(sequence)
        elif sequence in group.held:
            group.held.remove(sequence)
        sequence.state = SequenceState.ENDED
        if not group.sequences:
            self._close(group)
        elif group.held and group.leader is sequence:
            self._lead(group)  # it ended before the prompt was computed

    def _close(self, group: RequestGroup) -> None:
        if not group.is_started:
            if group.early_finished:  # the others were aborted; these are still to be told
                self._note_started(group, 0, self._progress_s)
            else:
                self._admission.left(group)
        del self._groups[group.request.request_id]

    def _slot_wait_s(self) -> float:
        """Predict when a slot is free: when the running choice with least to do has done it."""
        if self._batch.has_free_slot or not self._batch.sequences:
            return 0.0
        num_steps = min(
            sequence.group.request.max_tokens - sequence.num_generated
            for sequence in self._batch.sequences
        )
        return num_steps * self._rates.decode_step_s

    def check_integrity(self) -> None:
        """Prove that every choice is in one place, and everything below. Costs O(everything)."""
        self._queue.check_integrity()
        self._batch.check_integrity()
        num_queued = num_running = num_unstarted = 0
        for request_id, group in self._groups.items():
            assert group.request.request_id == request_id
            assert group.sequences, "a request without choices is kept"
            states = [sequence.state for sequence in group.sequences]
            num_queued += states.count(SequenceState.WAITING)
            num_running += states.count(SequenceState.RUNNING)
            num_unstarted += not group.is_started
            assert states.count(SequenceState.HELD) == len(group.held)
            assert not group.held or group.leader in group.sequences
        assert sum(len(g.sequences) for g in self._groups.values()) == self._num_choices
        assert num_queued == len(self._queue)
        assert num_running == len(self._batch.sequences)
        assert num_unstarted == self._admission.num_requests
        planned = self._open.sequences if self._open else ()
        holders = self._batch.sequences + self._batch.closing
        assert {id(s) for s in holders if s.is_planned} == {id(s) for s in planned}


def _finish_reason(sequence: Sequence) -> FinishReason | None:
    """Say whether the choice's tokens end it."""
    request, num_generated = sequence.group.request, sequence.num_generated
    if (
        num_generated
        and sequence.token_ids[-1] in request.stop_token_ids
        and num_generated >= request.sampling.min_tokens
    ):
        return FinishReason.STOP
    return FinishReason.LENGTH if num_generated >= request.max_tokens else None


def _finished(sequence: Sequence, reason: FinishReason) -> ChoiceFinished:
    return ChoiceFinished(
        sequence.group.request.request_id,
        sequence.choice_index,
        reason,
        sequence.num_generated,
        sequence.num_preemptions,
    )


def _check_result(opened: OpenPlan, result: StepResult) -> None:
    """Refuse a result that is not the open plan's; it is our bug, and nothing is applied yet."""
    plan = opened.plan
    sampling = [row for row in plan.rows if row.samples]
    if result.step_id != plan.step_id or len(result.token_ids) != len(sampling):
        raise EngineFailure(
            f"result of step {result.step_id} with {len(result.token_ids)} entries; "
            f"the open plan is {plan.step_id} with {len(sampling)} sampling rows"
        )
    failed = {row.slot for row in result.failed_rows}
    for row, token_ids in zip(sampling, result.token_ids, strict=True):
        if len(token_ids) != 1 and row.slot not in failed:
            raise EngineFailure(f"slot {row.slot} sampled {len(token_ids)} tokens, expected 1")
