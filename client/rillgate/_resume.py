"""One stream over the calls that it takes: what each asks for, and whether there is another.

Owns the decision after a break, for both clients. Knows nothing of gRPC calls, threads and loops:
whoever makes the calls also waits. What was received is `_accumulate`'s, how long to wait
`_status`'s.

    refused before anything came    a few tries (RetryConfig.max_attempts), the same request
    broke before anything came      many tries (max_resumes in a row), the same request
    broke after something came      as many, a continuation; progress counts them anew
    an error that the server means  none
"""

from rillgate._accumulate import Accumulator
from rillgate._convert_request import continued_request
from rillgate._status import RetryState, is_break, is_interruption
from rillgate.errors import RillgateError
from rillgate.types import Chunk
from rillgate_proto.v1 import inference_pb2 as pb


class StreamSession:
    """Owns one stream's request and what became of its calls so far."""

    def __init__(
        self, request: pb.GenerateRequest, accumulator: Accumulator, retry: RetryState, resume: bool
    ) -> None:
        """Begin without a call; `resume` False: an answer that broke is the caller's to go on."""
        self.accumulator = accumulator
        self._request = request
        self._retry = retry
        self._resume = resume
        self.is_interrupted = False
        """Whether a call that was under way broke."""

    def __repr__(self) -> str:
        """Show what was received."""
        return f"StreamSession({self.accumulator!r}, interrupted={self.is_interrupted})"

    def remaining_s(self) -> float | None:
        """Say how much of the deadline is left for the next call; None: there is none."""
        return self._retry.remaining_s()

    def next_request(self) -> pb.GenerateRequest:
        """Give what the next call asks for: all, or what is missing."""
        self.accumulator.begin_call(goes_on=self.is_interrupted)
        continuation = self.accumulator.continuation()
        if continuation is None:
            return self._request
        return continued_request(self._request, continuation)

    def push(self, message: pb.GenerateResponse) -> list[Chunk]:
        """Add a message of the call under way; raises ProtocolError."""
        num_prompt_logprobs = len(self.accumulator.prompt_logprobs)
        chunks = self.accumulator.push(message)
        # Started alone is no progress: a request that breaks every server must end some time.
        if chunks or len(self.accumulator.prompt_logprobs) > num_prompt_logprobs:
            self._retry.note_progress()
        return chunks

    def is_over(self, error: RillgateError) -> bool:
        """Tell whether nothing was lost with a call that ended so."""
        return self._resume and is_break(error) and self.accumulator.is_complete

    def wait_before_next_s(self, error: RillgateError) -> float | None:
        """Say how long to wait before the next call; None: there is none, raise `error`."""
        has_begun = self.accumulator.started is not None
        if not self._resume:
            return None if has_begun else self._retry.wait_before_retry_s(error)
        self.is_interrupted |= is_break(error) if has_begun else is_interruption(error)
        if self.is_interrupted:
            return self._retry.wait_before_resume_s(error)
        return self._retry.wait_before_retry_s(error)
