"""One request from the engine's events to the caller's stream: text, ends, usage, continuation.

Plain synchronous code: events go in, updates go to the stream's writer. Owns each choice's tokens,
text and counts. Does not know gRPC, replicas, tasks or time (a clock is an argument).

The text a caller has is a pure function E of its request and the token ids it has (contracts,
section 3). Given tokens are replayed into the same assemblers with what they bring dropped, so that
E(all) minus E(given) is what follows. A choice that the deadline ends is not flushed: withheld text
belongs to tokens that somebody may go on from.

When a replica is lost the request goes on elsewhere: `submission` gives it with all tokens that
came, and the assemblers, which hold text back for half characters and stop strings, just go on.
"""

from collections.abc import Sequence
from dataclasses import replace

from rillgate_server.core.clock import Clock
from rillgate_server.core.pending_output import StepEntry
from rillgate_server.core.request import (
    ChoiceStart,
    FinishReason,
    Rejection,
    RejectReason,
    Speculation,
)
from rillgate_server.core.step import (
    ChoiceFinished,
    ChoiceTokens,
    PromptLogprobs,
    RequestFailed,
    RequestStarted,
)
from rillgate_server.core.submission import Submission
from rillgate_server.errors import (
    DeadlineUnattainable,
    Draining,
    EngineFailure,
    InvalidRequest,
    NoReplica,
    Overloaded,
    RillgateError,
    StreamLost,
)
from rillgate_server.gateway.prompt import PreparedCall
from rillgate_server.gateway.text.assembler import TextAssembler, TextDelta
from rillgate_server.gateway.text.model_text import ModelText
from rillgate_server.service.generate_call import (
    ChoiceEnd,
    EndReason,
    OutputDelta,
    Started,
    Usage,
)
from rillgate_server.service.stream_writer import StreamWriter

_END_OF_ENGINE = {FinishReason.STOP: EndReason.STOP, FinishReason.LENGTH: EndReason.LENGTH}


class _Choice:
    """What is known of one choice."""

    __slots__ = (
        "assembler",
        "end_reason",
        "first_token_s",
        "index",
        "last_token_s",
        "num_given",
        "num_preemptions",
        "token_ids",
    )

    def __init__(self, index: int, assembler: TextAssembler) -> None:
        self.index = index
        self.assembler = assembler
        self.token_ids: list[int] = []  # from the original start; what follows a stop string is cut
        self.num_given = 0
        self.num_preemptions = 0
        self.first_token_s: float | None = None  # of the new ones
        self.last_token_s = 0.0
        self.end_reason: EndReason | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


class Generation:
    """One request under way.

    State: the choices, whether Started was given, the queue's wait and cached tokens once known,
    whether the prompt's log-probabilities are still to come.
    """

    def __init__(
        self,
        prepared: PreparedCall,
        model_text: ModelText,
        writer: StreamWriter,
        clock: Clock,
        arrival_s: float,
    ) -> None:
        """Replay what the caller has; choices that it already ends are ended.

        `arrival_s`: when the call came, on `clock`.
        """
        self._prepared = prepared
        self._writer = writer
        self._clock = clock
        self._arrival_s = arrival_s
        self._started: RequestStarted | None = None
        self._held_back: list[tuple[OutputDelta | None, ChoiceEnd]] = []  # until Started
        self._choices = [
            self._replayed(index, model_text) for index in range(prepared.call.num_choices)
        ]
        # Given tokens came after the prompt's log-probabilities: these were sent before.
        self._wants_prompt_logprobs = not any(choice.num_given for choice in self._choices)
        if self.is_over:
            self._start(RequestStarted(0, 0.0, 0))

    def __repr__(self) -> str:
        open_choices = [choice.index for choice in self._choices if choice.end_reason is None]
        return f"Generation({self._prepared.request_id!r}, open={open_choices})"

    @property
    def is_over(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.end_reason is not None for choice in self._choices)

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices, given ones included."""
        return sum(choice.num_tokens for choice in self._choices)

    @property
    def is_started(self) -> bool:
        """Whether the caller was told that its request runs."""
        return self._started is not None

    def submission(self, time_remaining_s: float | None) -> Submission:
        """Return what a replica is to do: the choices that have not ended, at least one, each with
        all its tokens so far.

        `time_remaining_s`: until this stream ends at its deadline; None: it has none.
        """
        call = self._prepared.call
        sampling = call.sampling
        if not self._wants_prompt_logprobs:
            sampling = replace(sampling, num_prompt_logprobs=None)
        return Submission(
            request_id=self._prepared.request_id,
            prompt_token_ids=self._prepared.prompt_token_ids,
            sampling=sampling,
            max_tokens=self._prepared.max_tokens,
            choices=tuple(
                ChoiceStart(choice.index, tuple(choice.token_ids))
                for choice in self._choices
                if choice.end_reason is None
            ),
            stop_token_ids=call.stop_token_ids,
            ignore_eos=call.ignore_eos,
            cache_salt=self._prepared.account.cache_salt,
            num_shared_prefix_tokens=self._prepared.num_shared_prefix_tokens,
            tenant=self._prepared.account.tenant,
            priority=call.priority,
            speculation=call.speculation,
            time_remaining_s=time_remaining_s,
            waited_s=max(0.0, self._clock.now() - self._arrival_s),
        )

    # -- events -----------------------------------------------------------------------------------

    def apply(self, events: Sequence[StepEntry]) -> tuple[int, ...]:
        """Take a replica's events; return the choices that it need not go on with.

        Raises EngineFailure when the request failed.
        """
        ended_here: list[int] = []
        for event in events:
            if isinstance(event, ChoiceTokens):
                if self._add_tokens(event):
                    ended_here.append(event.choice_index)
            elif isinstance(event, ChoiceFinished):
                self._add_finished(event)
            elif isinstance(event, RequestStarted):
                if self._started is None:  # else it goes on elsewhere, and the caller knows
                    self._start(event)
            elif isinstance(event, PromptLogprobs):
                if self._wants_prompt_logprobs:
                    self._writer.add_prompt_logprobs(event.positions)
                    self._wants_prompt_logprobs = False
            else:
                assert isinstance(event, RequestFailed)
                raise EngineFailure(event.message)
        return tuple(ended_here)

    def break_off(self) -> None:
        """Note that the replica is gone; choices whose tokens say so have ended.

        A choice's last token and its end leave a replica in one message today; this keeps it from
        mattering.
        """
        for choice in self._choices:
            if choice.end_reason is None:
                reason = self._end_of(choice.token_ids, stop_string=None)
                if reason is not None:
                    self._finish(choice, reason)

    def lost(self, retry_after_s: float, why: str) -> NoReplica:
        """Return what the call ends with when nobody goes on with it."""
        if self._started is None:
            return NoReplica(why, retry_after_s)
        prepared = self._prepared
        return StreamLost(
            why,
            retry_after_s,
            {
                "request_id": prepared.request_id,
                "model_version": prepared.model_version,
                "seed": str(prepared.call.sampling.seed),
                "prompt_digest": prepared.prompt_digest.hex(),
                "template_time_ms": str(prepared.template_time_ms),
                "num_tokens": ",".join(str(choice.num_tokens) for choice in self._choices),
            },
        )

    def end_at_deadline(self) -> None:
        """End every open choice with what there is."""
        if self._started is None:
            self._start(RequestStarted(0, self._clock.now() - self._arrival_s, 0))
        for choice in self._choices:
            if choice.end_reason is None:
                self._writer.add_end(self._end(choice, EndReason.DEADLINE))

    def _add_tokens(self, event: ChoiceTokens) -> bool:
        """Give new tokens on; return whether a stop string ended the choice."""
        choice = self._choices[event.choice_index]
        if choice.end_reason is not None:
            return False
        if event.token_offset != choice.num_tokens:
            raise EngineFailure(
                f"choice {choice.index} went on at token {event.token_offset}, "
                f"expected {choice.num_tokens}"
            )
        choice.last_token_s = self._clock.now()
        if choice.first_token_s is None:
            choice.first_token_s = choice.last_token_s
        delta = choice.assembler.push(event.token_ids)
        num_used = delta.num_tokens_used
        self._writer.add_output(
            OutputDelta(
                choice.index,
                choice.num_tokens,
                event.token_ids[:num_used],
                delta.text,
                delta.reasoning_text,
                event.logprobs[:num_used],
            )
        )
        choice.token_ids += event.token_ids[:num_used]
        if delta.stop_string is None:
            return False
        self._writer.add_end(self._end(choice, EndReason.STOP_STRING, delta.stop_string))
        return True

    def _add_finished(self, event: ChoiceFinished) -> None:
        choice = self._choices[event.choice_index]
        choice.num_preemptions = event.num_preemptions
        if choice.end_reason is not None:
            return
        if event.num_tokens != choice.num_tokens:
            raise EngineFailure(
                f"choice {choice.index} ended with {event.num_tokens} tokens, "
                f"{choice.num_tokens} came"
            )
        self._finish(choice, _END_OF_ENGINE[event.reason])

    def _finish(self, choice: _Choice, reason: EndReason) -> None:
        """End a choice with the text that its end sets free."""
        rest = _rest(choice, choice.assembler.finish())
        if rest is not None:
            self._writer.add_output(rest)
        self._writer.add_end(self._end(choice, reason))

    def _start(self, event: RequestStarted) -> None:
        prepared = self._prepared
        self._started = event
        self._writer.add_started(
            Started(
                request_id=prepared.request_id,
                model_version=prepared.model_version,
                seed=prepared.call.sampling.seed,
                num_prompt_tokens=len(prepared.prompt_token_ids),
                num_cached_tokens=event.num_cached_tokens,
                prompt_digest=prepared.prompt_digest,
                template_time_ms=prepared.template_time_ms,
                is_resumed=prepared.call.resumption is not None,
            )
        )
        for rest, end in self._held_back:
            if rest is not None:
                self._writer.add_output(rest)
            self._writer.add_end(end)
        self._held_back.clear()

    # -- choices ----------------------------------------------------------------------------------

    def _replayed(self, index: int, model_text: ModelText) -> _Choice:
        """Make a choice and replay what the caller has of it."""
        prepared, call = self._prepared, self._prepared.call
        given = prepared.given(index)
        assembler = TextAssembler(
            model_text,
            prepared.prompt_token_ids,
            call.stop_strings,
            call.sampling.min_tokens,
            silent_token_ids=frozenset(call.stop_token_ids),
        )
        choice = _Choice(index, assembler)
        replayed = assembler.push(given.token_ids)
        choice.token_ids += given.token_ids[: replayed.num_tokens_used]
        choice.num_given = len(given.token_ids)
        stop_string = replayed.stop_string or ""
        if given.end_reason is not None:
            self._held_back.append((None, self._end(choice, given.end_reason, stop_string)))
        elif (reason := self._end_of(given.token_ids, replayed.stop_string)) is not None:
            rest = _rest(choice, assembler.finish())
            self._held_back.append((rest, self._end(choice, reason, stop_string)))
        return choice

    def _end_of(self, token_ids: Sequence[int], stop_string: str | None) -> EndReason | None:
        """Say whether tokens end their choice, by the order that the engine goes by."""
        if stop_string is not None:
            return EndReason.STOP_STRING
        # The engine draws no ending id before min_tokens, so one there ends nothing.
        can_stop = len(token_ids) > self._prepared.call.sampling.min_tokens
        if token_ids and can_stop and token_ids[-1] in self._prepared.end_token_ids:
            return EndReason.STOP
        return EndReason.LENGTH if len(token_ids) >= self._prepared.max_tokens else None

    def _end(self, choice: _Choice, reason: EndReason, stop_string: str = "") -> ChoiceEnd:
        choice.end_reason = reason
        return ChoiceEnd(choice.index, reason, self._usage(choice), stop_string)

    def _usage(self, choice: _Choice) -> Usage:
        started, first_s = self._started, choice.first_token_s
        queue_s = started.queue_s if started is not None else 0.0
        decode_s = choice.last_token_s - first_s if first_s is not None else 0.0
        num_after_first = choice.num_tokens - choice.num_given - 1
        return Usage(
            prompt_tokens=len(self._prepared.prompt_token_ids),
            completion_tokens=choice.num_tokens,
            cached_tokens=started.num_cached_tokens if started is not None else 0,
            cached_host_tokens=started.num_cached_host_tokens if started is not None else 0,
            num_preemptions=choice.num_preemptions,
            queue_s=queue_s,
            prefill_s=max(first_s - self._arrival_s - queue_s, 0.0) if first_s is not None else 0.0,
            decode_s=decode_s,
            tokens_per_second=(
                num_after_first / decode_s if num_after_first > 0 and decode_s > 0 else 0.0
            ),
        )


def _rest(choice: _Choice, delta: TextDelta) -> OutputDelta | None:
    """Return the text that a choice's end sets free, if there is any."""
    if not (delta.text or delta.reasoning_text):
        return None
    return OutputDelta(choice.index, choice.num_tokens, (), delta.text, delta.reasoning_text)


def refusal(rejection: Rejection, time_remaining_s: float | None) -> RillgateError:
    """Say to the caller why its request was not taken on, with `time_remaining_s` left."""
    if rejection.reason is RejectReason.DEADLINE_NEVER:
        return DeadlineUnattainable(rejection.predicted_ttft_s, time_remaining_s or 0.0)
    if rejection.reason in (RejectReason.OVERLOADED, RejectReason.DEADLINE_NOW):
        return Overloaded(rejection.message, rejection.retry_after_s)
    if rejection.reason is RejectReason.DRAINING:
        return Draining(rejection.message)
    if rejection.reason is RejectReason.NO_DRAFT_MODEL:
        allowed = "off, prompt-lookup or auto: this server has no draft model"
        return InvalidRequest.of("speculation", Speculation.DRAFT_MODEL.value, allowed)
    return InvalidRequest.of("request", "refused by the engine", rejection.message)
