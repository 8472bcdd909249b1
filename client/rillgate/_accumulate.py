"""What the messages of one stream add up to.

Owns the sum so far: chunks for the caller, the whole result, the continuation. Knows nothing of
gRPC calls, so both clients share it. Checks what the protocol promises: tokens of a choice follow
each other without a gap or a repeat, and every choice ends.
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
        self.was_given_finished = self.finish_reason is not None
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
        self.started: Started | None = None
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    def __repr__(self) -> str:
        """Show how far each choice is."""
        lengths = {index: len(choice.token_ids) for index, choice in self._choices.items()}
        return f"Accumulator(started={self.started is not None}, num_tokens={lengths})"

    def push(self, message: pb.GenerateResponse) -> list[Chunk]:
        """Add one message; give one chunk per choice that it speaks of."""
        if message.HasField("started"):
            self.started = to_started(message.started)
        elif self.started is None:
            raise ProtocolError("the stream's first message does not say what was started")
        if message.prompt_logprobs:  # a long prompt's come in pieces
            self.prompt_logprobs += to_logprobs(message.prompt_logprobs)
        finished = {entry.choice_index: entry for entry in message.finished}
        chunks = [
            self._push_output(output, finished.pop(output.choice_index, None))
            for output in message.outputs
        ]
        return chunks + [self._push_end(index, entry) for index, entry in finished.items()]

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

    def _push_end(self, index: int, finished: pb.Finished) -> Chunk:
        """Give the chunk of a choice that ends without a new token."""
        choice = self._choices.get(index)
        # A choice that was given finished may be confirmed; any other ends once.
        if choice is None or (choice.finish_reason is not None and not choice.was_given_finished):
            raise ProtocolError(f"choice {index} ends, but it is not open")
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
        return Generation(self.started, tuple(choices), self.prompt_logprobs)

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
