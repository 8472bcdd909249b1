"""Every request that was accepted and has not ended, and what is told of it.

Owns a request's life from its acceptance to its last event: which choice computes the prompt for
the others, when the request has started, when a choice ends, and who hears of it. Does not know
plans, budgets or rates: the scheduler calls it when something has happened.

    a request's choices:   leader ──▶ queue ──▶ batch      computes the prompt
                           held   ─ ─ ─ ─ ─ ─ ─ ─ ─ ▶ queue ──▶ batch, as prefix hits

    told, in this order:   started, (prompt logprobs, tokens)*, finished of each choice | failed
"""

from rillgate_server.core.request import FinishReason
from rillgate_server.core.step import (
    ChoiceFinished,
    ChoiceTokens,
    PromptLogprobs,
    RequestFailed,
    RequestStarted,
    TokenLogprobs,
)
from rillgate_server.scheduler.admission import Admission
from rillgate_server.scheduler.request_queue import RequestQueue
from rillgate_server.scheduler.running_batch import RunningBatch
from rillgate_server.scheduler.sequence import RequestGroup, Sequence, SequenceState
from rillgate_server.scheduler.step_events import StepEvents


class RequestTable:
    """The requests, and the events that no output has carried yet.

    State: the requests by id, the events, how many were accepted, how many choices have not ended,
    and counters of prompt tokens since the start.
    """

    def __init__(self, queue: RequestQueue, batch: RunningBatch, admission: Admission) -> None:
        """Start empty; choices go to `queue` and leave it and `batch` when they end."""
        self.events = StepEvents()
        self.num_choices = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self._groups: dict[int, RequestGroup] = {}  # request id -> its choices
        self._num_added = 0
        self._queue = queue
        self._batch = batch
        self._admission = admission

    def __repr__(self) -> str:
        return f"RequestTable(requests={len(self._groups)}, choices={self.num_choices})"

    def __len__(self) -> int:
        return len(self._groups)

    # -- beginning --------------------------------------------------------------------------------

    def add(self, group: RequestGroup, now: float) -> None:
        """Take in a request: its first choice is queued, those that were ended before are told."""
        request = group.request
        assert request.request_id not in self._groups, "request ids are unique"
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
        self.num_choices += len(group.sequences)
        if group.sequences:
            self._lead(group, now)
        else:
            self._tell_started(group, now)
            self._close(group)

    def note_started(self, sequence: Sequence, now: float) -> None:
        """Take note that a choice begins to run: its tokens up to num_computed were found."""
        group = sequence.group
        if not group.is_started:
            self._tell_started(group, now, sequence.num_computed, sequence.num_host_tokens)
        if sequence.gathers_prompt_logprobs:
            group.prompt_logprobs = []  # a preemption may have lost the first part

    def _lead(self, group: RequestGroup, now: float) -> None:
        """Let the first choice that is held compute the prompt for the others."""
        group.leader = group.held.pop(0)
        self._queue.push(group.leader, now)

    def _tell_started(
        self, group: RequestGroup, now: float, num_hit_tokens: int = 0, num_host_tokens: int = 0
    ) -> None:
        request = group.request
        num_prompt_tokens = len(request.prompt_token_ids)
        num_cached_tokens = min(num_hit_tokens, num_prompt_tokens)
        group.is_started = True
        self._admission.left(group)
        self.num_prompt_tokens += num_prompt_tokens
        self.num_cached_tokens += num_cached_tokens
        queue_s = max(0.0, now - request.arrival_s)
        self.events.started.append(
            RequestStarted(
                request.request_id,
                queue_s,
                num_cached_tokens,
                min(num_host_tokens, num_cached_tokens),
            )
        )
        self.events.finished += group.early_finished

    # -- on the way -------------------------------------------------------------------------------

    def note_prefill(
        self, sequence: Sequence, entries: tuple[TokenLogprobs, ...], now: float
    ) -> None:
        """Gather the prompt's log-probabilities; let the other choices go once it is computed."""
        group = sequence.group
        if group.leader is not sequence:
            return
        if group.prompt_logprobs is not None:
            group.prompt_logprobs += entries
            if sequence.is_prompt_computed:
                gathered = tuple(group.prompt_logprobs)
                self.events.prompt_logprobs.append(
                    PromptLogprobs(group.request.request_id, gathered)
                )
                group.prompt_logprobs = None
        if sequence.is_prompt_computed:
            for follower in group.held:
                self._queue.push(follower, now)
            group.held.clear()

    def append(
        self,
        sequence: Sequence,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> int:
        """Take in sampled tokens, up to the one that ends the choice; return how many those are.

        `finish` then ends it: first its blocks are offered to others.
        """
        offset, num_kept = sequence.num_generated, 0
        for token_id in token_ids:
            sequence.token_ids.append(token_id)
            num_kept += 1
            if _finish_reason(sequence) is not None:
                break
        self.events.tokens.append(
            ChoiceTokens(
                sequence.group.request.request_id,
                sequence.choice_index,
                offset,
                token_ids[:num_kept],
                logprobs[:num_kept],
            )
        )
        return num_kept

    def finish(self, sequence: Sequence) -> None:
        """End the choice if its tokens do."""
        reason = _finish_reason(sequence)
        if reason is not None:
            self.events.finished.append(_finished(sequence, reason))
            self._end(sequence)

    # -- ending -----------------------------------------------------------------------------------

    def abort(self, request_id: int, choice_indices: tuple[int, ...]) -> None:
        """End some choices of a request, or all with `()`; nothing more is told of them."""
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
        self.events.forget(request_id, choice_indices)

    def fail(self, group: RequestGroup, message: str) -> None:
        """End a request by a fault; nothing follows for any of its choices."""
        self.events.failed.append(RequestFailed(group.request.request_id, message))
        group.held.clear()
        group.early_finished.clear()
        for sequence in tuple(group.sequences):
            self._end(sequence)

    def fail_all(self, message: str) -> None:
        """End every request by a fault."""
        for group in tuple(self._groups.values()):
            self.fail(group, message)

    def _end(self, sequence: Sequence) -> None:
        """End one choice, wherever it is; with the last one its request is gone."""
        group = sequence.group
        group.sequences.remove(sequence)
        self.num_choices -= 1
        if sequence.state in (SequenceState.RUNNING, SequenceState.LOADING):
            self._batch.end(sequence)
        elif sequence.state is SequenceState.WAITING:
            self._queue.remove(sequence)
        elif sequence in group.held:
            group.held.remove(sequence)
        sequence.state = SequenceState.ENDED
        if not group.sequences:
            self._close(group)
        elif group.held and group.leader is sequence:
            # It ended before the prompt was computed. Its order is its request's, whenever it is.
            self._lead(group, group.request.arrival_s)

    def _close(self, group: RequestGroup) -> None:
        if not group.is_started:
            if group.early_finished:  # the others were aborted; these are still to be told
                self._tell_started(group, group.request.arrival_s)
            else:
                self._admission.left(group)
        del self._groups[group.request.request_id]

    def check_integrity(self) -> None:
        """Prove that every choice is in exactly one place, and that the sums are right."""
        num_queued = num_running = num_loading = num_unstarted = num_choices = 0
        for request_id, group in self._groups.items():
            assert group.request.request_id == request_id
            assert group.sequences, "a request without choices is kept"
            states = [sequence.state for sequence in group.sequences]
            num_choices += len(states)
            num_queued += states.count(SequenceState.WAITING)
            num_running += states.count(SequenceState.RUNNING)
            num_loading += states.count(SequenceState.LOADING)
            num_unstarted += not group.is_started
            assert states.count(SequenceState.HELD) == len(group.held)
            assert not group.held or group.leader in group.sequences
        assert num_choices == self.num_choices
        assert num_queued == len(self._queue)
        assert num_running == len(self._batch.sequences)
        assert num_loading == len(self._batch.loading)
        assert num_unstarted == self._admission.num_requests


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
