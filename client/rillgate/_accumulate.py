"""What the messages of one stream add up to, over all the calls that it takes.

Owns the sum so far: chunks for the caller, the whole result, the continuation. Knows nothing of
gRPC, so both clients share it. Checks what the protocol promises: tokens of a choice follow each
other without a gap or a repeat, and every choice ends.

A call that goes on from here may say again what the caller has: who it is (Started), the prompt's
log-probabilities while there is no token, the ends of choices. None of it is given twice.
"""

from rillgate._convert_response import to_logprobs, to_reason, to_started, to_usage
from rillgate.errors import ProtocolError
from rillgate.types import (
    Choice,
    Chunk,
    Continuation,
    ContinuedChoice,
    FinishReason,
    Generation,
    Started,
    TokenLogprobs,
    Usage,
)
from rillgate_proto.v1 import inference_pb2 as pb


class _ChoiceSoFar:
    """One choice: given tokens, new ones and their texts."""

    def __init__(self, given: ContinuedChoice | None) -> None:
        self.num_given = 0 if given is None else len(given.token_ids)
        self.token_ids: list[int] = [] if given is None else list(given.token_ids)
        self.finish_reason: FinishReason | None = None if given is None else given.finish_reason
        self.may_be_confirmed = False  # finished before this call, which may say so once
        self.texts: list[str] = []
        self.reasoning_texts: list[str] = []
        self.logprobs: list[TokenLogprobs] = []
        self.stop_string = ""
        self.usage: Usage | None = None


class Accumulator:
    """Owns the choices so far (index -> what there is) and what the first message said."""

    def __init__(self, num_choices: int, continuation: Continuation | None) -> None:
        """Begin with what the caller already has."""
        given = {choice.index: choice for choice in continuation.choices} if continuation else {}
        self._choices = {index: _ChoiceSoFar(given.get(index)) for index in range(num_choices)}
        self.started: Started | None = None  # of the first call that began
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self.num_resumes = 0
        self._goes_on = False
        self._has_call_started = False
        self._num_prompt_logprobs_of_call = 0
        self.begin_call(goes_on=False)

    def __repr__(self) -> str:
        """Show how far each choice is."""
        lengths = {index: len(choice.token_ids) for index, choice in self._choices.items()}
        return f"Accumulator(started={self.started is not None}, num_tokens={lengths})"

    def begin_call(self, goes_on: bool) -> None:
        """Expect the messages of a new call; `goes_on`: one before it broke."""
        self._goes_on = goes_on
        self._has_call_started = False
        self._num_prompt_logprobs_of_call = 0
        for choice in self._choices.values():
            choice.may_be_confirmed = choice.finish_reason is not None

    @property
    def is_complete(self) -> bool:
        """Whether the caller has everything, with or without the stream's own end."""
        return all(choice.usage is not None for choice in self._choices.values())

    def push(self, message: pb.GenerateResponse) -> list[Chunk]:
        """Add one message; give one chunk per choice of which it says something new."""
        if message.HasField("started"):
            self._start(to_started(message.started))
        elif not self._has_call_started:
            raise ProtocolError("the stream's first message does not say what was started")
        if message.prompt_logprobs:
            self._push_prompt_logprobs(to_logprobs(message.prompt_logprobs))
        finished = {entry.choice_index: entry for entry in message.finished}
        chunks = [
            self._push_output(output, finished.pop(output.choice_index, None))
            for output in message.outputs
        ]
        ends = [self._push_end(index, entry) for index, entry in finished.items()]
        return chunks + [end for end in ends if end is not None]

    def _start(self, started: Started) -> None:
        """Keep the first call's answer: the others go on with the same."""
        first = self.started
        if first is None:
            self.started = started
        elif (started.seed, started.model_version, started.prompt_digest) != (
            first.seed,
            first.model_version,
            first.prompt_digest,
        ):
            raise ProtocolError("the stream goes on with another seed, model version or prompt")
        if self._goes_on and not self._has_call_started:
            self.num_resumes += 1
        self._has_call_started = True

    def _push_prompt_logprobs(self, logprobs: tuple[TokenLogprobs, ...]) -> None:
        """Add a piece (a long prompt's come in several), or what of it is new."""
        num_known = len(self.prompt_logprobs) - self._num_prompt_logprobs_of_call
        self._num_prompt_logprobs_of_call += len(logprobs)
        self.prompt_logprobs += logprobs[num_known:]

    def _push_output(self, output: pb.Output, finished: pb.Finished | None) -> Chunk:
        choice = self._open_choice(output.choice_index)
        if output.token_offset != len(choice.token_ids):
            raise ProtocolError(
                f"choice {output.choice_index}: tokens from {output.token_offset} on were sent "
                f"after {len(choice.token_ids)} tokens"
            )
        logprobs = to_logprobs(output.logprobs)
        choice.token_ids.extend(output.token_ids)
        choice.texts.append(output.text)
        choice.reasoning_texts.append(output.reasoning_text)
        choice.logprobs.extend(logprobs)
        if finished is not None:
            _finish(choice, finished)
        return Chunk(
            choice_index=output.choice_index,
            text=output.text,
            reasoning_text=output.reasoning_text,
            token_ids=tuple(output.token_ids),
            token_offset=output.token_offset,
            logprobs=logprobs,
            finish_reason=choice.finish_reason,
            stop_string=choice.stop_string,
            usage=choice.usage,
        )

    def _push_end(self, index: int, finished: pb.Finished) -> Chunk | None:
        """Give the chunk of a choice that ends without a new token; None: the caller had it."""
        choice = self._choices.get(index)
        if choice is None or (choice.finish_reason is not None and not choice.may_be_confirmed):
            raise ProtocolError(f"choice {index} ends, but it is not open")
        choice.may_be_confirmed = False
        if choice.usage is not None:
            return None
        _finish(choice, finished)
        return Chunk(
            choice_index=index,
            text="",
            reasoning_text="",
            token_ids=(),
            token_offset=len(choice.token_ids),
            logprobs=(),
            finish_reason=choice.finish_reason,
            stop_string=choice.stop_string,
            usage=choice.usage,
        )

    def _open_choice(self, index: int) -> _ChoiceSoFar:
        choice = self._choices.get(index)
        if choice is None or choice.finish_reason is not None:
            raise ProtocolError(f"choice {index} has new tokens, but it is not open")
        return choice

    def generation(self) -> Generation:
        """Give the whole result; raise ProtocolError when a choice has not ended."""
        if self.started is None:
            raise ProtocolError("the stream ended before it started")
        choices = []
        for index, choice in self._choices.items():
            if choice.finish_reason is None:
                raise ProtocolError(f"the stream ended, but choice {index} did not")
            if choice.usage is not None:  # None: it was finished before, and is not made again
                choices.append(_whole(index, choice, choice.finish_reason, choice.usage))
        return Generation(self.started, tuple(choices), self.prompt_logprobs, self.num_resumes)

    def continuation(self) -> Continuation | None:
        """Give what it takes to go on from here; None before the first message."""
        if self.started is None:
            return None
        return Continuation(
            request_id=self.started.request_id,
            model_version=self.started.model_version,
            seed=self.started.seed,
            prompt_digest=self.started.prompt_digest,
            template_time_ms=self.started.template_time_ms,
            choices=tuple(
                ContinuedChoice(index, tuple(choice.token_ids), choice.finish_reason)
                for index, choice in self._choices.items()
            ),
        )


def _finish(choice: _ChoiceSoFar, finished: pb.Finished) -> None:
    choice.finish_reason = to_reason(finished.reason)
    choice.stop_string = finished.stop_string
    choice.usage = to_usage(finished.usage)


def _whole(index: int, choice: _ChoiceSoFar, reason: FinishReason, usage: Usage) -> Choice:
    return Choice(
        index=index,
        text="".join(choice.texts),
        reasoning_text="".join(choice.reasoning_texts),
        token_ids=tuple(choice.token_ids[choice.num_given :]),
        logprobs=tuple(choice.logprobs),
        finish_reason=reason,
        stop_string=choice.stop_string,
        usage=usage,
    )
