"""The way of an answer without its sockets: engine's events, generation, messages, client.

Everything between is the real thing: the gateway's request conversion, preparation, Generation and
StreamWriter, the protobuf messages, the client's StreamSession and Accumulator. The engine is a
script: which tokens each choice gets. `Breaks` says where the way breaks:

    failover  the replica is lost; the generation goes on with another one, from its own tokens
    cut       the connection is lost with the last messages; the client goes on by a continuation
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rillgate._accumulate import Accumulator
from rillgate._resume import StreamSession
from rillgate._status import RetryState
from rillgate.config import RetryConfig
from rillgate.errors import UnavailableError
from rillgate.types import Chunk
from rillgate.types import Generation as Heard
from rillgate_proto.v1 import inference_pb2 as pb
from rillgate_server.core.clock import VirtualClock
from rillgate_server.core.pending_output import StepEntry
from rillgate_server.core.request import FinishReason
from rillgate_server.core.step import (
    ChoiceFinished,
    ChoiceTokens,
    PromptLogprobs,
    RequestStarted,
)
from rillgate_server.core.submission import Submission
from rillgate_server.engine.testing import fake_logprobs
from rillgate_server.gateway.generation import Generation
from rillgate_server.gateway.prompt import prepare
from rillgate_server.gateway.tenancy import Tenancy
from rillgate_server.service.convert_public import generate_response, to_generate_call
from rillgate_server.service.generate_call import StreamUpdate
from rillgate_server.service.stream_writer import StreamWriter
from tests.gateway.stack import served_model

SEED = 7
_ACCOUNT_SECRET = "a secret that is long enough"


@dataclass(frozen=True)
class Script:
    """What the engine makes: each choice's tokens, long enough for max_tokens."""

    request: pb.GenerateRequest
    tokens: tuple[tuple[int, ...], ...]

    def end_of(self, choice: int) -> tuple[int, FinishReason]:
        """Return how many tokens a choice gets, and why it ends: as the engine decides it."""
        stopping = self.request.stopping
        ends = set(stopping.stop_token_ids)
        if not stopping.ignore_eos:
            ends |= set(served_model().spec.eos_token_ids)
        for index, token_id in enumerate(self.tokens[choice][: stopping.max_tokens]):
            if token_id in ends and index >= stopping.min_tokens:
                return index + 1, FinishReason.STOP
        return stopping.max_tokens, FinishReason.LENGTH


@dataclass
class Breaks:
    """Draws what happens next; each function is asked again and again."""

    group_size: Callable[[], int] = lambda: 1 << 20
    """Tokens of a choice in the next event, at least one."""
    after_event: Callable[[], str] = lambda: ""
    """`failover`, `cut` or nothing."""
    num_lost_messages: Callable[[], int] = lambda: 0
    """Of the latest ones, with a cut."""


@dataclass
class Outcome:
    """What the client has in the end."""

    heard: Heard
    chunks: list[Chunk] = field(default_factory=list)
    num_failovers: int = 0

    @property
    def facts(self) -> object:
        """Everything that must not depend on breaks."""
        return [
            (
                *(choice.index, choice.token_ids, choice.text, choice.reasoning_text),
                *(choice.logprobs, choice.finish_reason, choice.stop_string),
                *(choice.usage.prompt_tokens, choice.usage.completion_tokens),
            )
            for choice in self.heard.choices
        ], self.heard.prompt_logprobs

    @property
    def joined_chunks(self) -> object:
        """What whoever only looked at the chunks has got, by choice."""
        return [
            (
                tuple(t for it in self.chunks if it.choice_index == index for t in it.token_ids),
                "".join(it.text for it in self.chunks if it.choice_index == index),
                "".join(it.reasoning_text for it in self.chunks if it.choice_index == index),
                sum(it.finish_reason is not None for it in self.chunks if it.choice_index == index),
            )
            for index in range(len(self.heard.choices))
        ]


def play(
    script: Script,
    breaks: Breaks | None = None,
    generation_class: type[Generation] = Generation,
) -> Outcome:
    """Take an answer over its whole way; return what the client has."""
    return asyncio.run(_Play(script, breaks or Breaks(), generation_class).run())


class _Play:
    def __init__(self, script: Script, breaks: Breaks, generation_class: type[Generation]) -> None:
        self._script = script
        self._breaks = breaks
        self._generation_class = generation_class
        accumulator = Accumulator(script.request.sampling.n, None)
        retry = RetryState(RetryConfig(max_attempts=100, max_resumes=10_000), None, time.monotonic)
        self._session = StreamSession(script.request, accumulator, retry, resume=True)
        self._chunks: list[Chunk] = []
        self._num_failovers = 0

    async def run(self) -> Outcome:
        while not await self._call():
            wait_s = self._session.wait_before_next_s(UnavailableError("cut", 0.0))
            assert wait_s is not None
        heard = self._session.accumulator.generation()
        return Outcome(heard, self._chunks, self._num_failovers)

    async def _call(self) -> bool:
        """Make one call; return whether the client has everything."""
        model = served_model()
        message = self._session.next_request()
        call = to_generate_call(message, model.spec, model.text.generation_defaults, lambda: SEED)
        account = Tenancy(_ACCOUNT_SECRET).account(None)  # type: ignore[arg-type]
        prepared = await prepare(call, model, "r", account)
        messages: list[pb.GenerateResponse] = []

        async def write(update: StreamUpdate) -> None:
            messages.append(generate_response(update))

        writer = StreamWriter(write)
        clock = VirtualClock()
        generation = self._generation_class(prepared, model.text, writer, clock, clock.now())
        writing = asyncio.create_task(writer.run())
        is_cut = await self._answer(generation)
        if is_cut:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            num_kept = max(0, len(messages) - self._breaks.num_lost_messages())
            messages = messages[:num_kept]
        else:
            writer.close()
            await writing
        for response in messages:
            data = response.SerializeToString()
            self._chunks += self._session.push(pb.GenerateResponse.FromString(data))
        return not is_cut

    async def _answer(self, generation: Generation) -> bool:
        """Let replicas answer one call; return whether the connection was cut meanwhile."""
        while not generation.is_over:
            what = await self._replica(generation)
            if what == "cut":
                return True
            if what == "failover":
                self._num_failovers += 1
                generation.break_off()
        return False

    async def _replica(self, generation: Generation) -> str:
        """Let one replica answer until it is lost, or something else is."""
        for event in self._events(generation.submission(None)):
            generation.apply([event])
            await asyncio.sleep(0)  # the writer writes what there is, as between two steps
            what = self._breaks.after_event()
            if what or generation.is_over:
                return what
        return ""

    def _events(self, submission: Submission) -> Iterator[StepEntry]:
        """Give what a replica says of a request that it goes on with."""
        yield RequestStarted(1, 0.0, 0)
        num_top = submission.sampling.num_prompt_logprobs
        if num_top is not None:
            ids = submission.prompt_token_ids[1:]
            yield PromptLogprobs(1, tuple(fake_logprobs(it, num_top) for it in ids))
        places = {it.index: len(it.generated_token_ids) for it in submission.choices}
        for it in submission.choices:
            made = self._script.tokens[it.index]
            assert it.generated_token_ids == made[: len(it.generated_token_ids)]
        while places:
            for choice in tuple(places):
                yield from self._next_group(submission, choice, places)

    def _next_group(
        self, submission: Submission, choice: int, places: dict[int, int]
    ) -> Iterator[StepEntry]:
        num_tokens, reason = self._script.end_of(choice)
        start = places[choice]
        end = min(start + self._breaks.group_size(), num_tokens)
        ids = self._script.tokens[choice][start:end]
        num_top = submission.sampling.num_logprobs
        logprobs = () if num_top is None else tuple(fake_logprobs(it, num_top) for it in ids)
        yield ChoiceTokens(1, choice, start, ids, logprobs)
        places[choice] = end
        if end == num_tokens:
            del places[choice]
            yield ChoiceFinished(1, choice, reason, num_tokens)


def interesting_ids(characters: str) -> Sequence[int]:
    """Return ids whose pieces are made of these characters, half characters, tags, and the end."""
    pieces = served_model().text.pieces.pieces
    wanted = characters.encode()
    spelt = [i for i, it in enumerate(pieces) if 0 < len(it) <= 3 and all(b in wanted for b in it)]
    halves = [i for i, it in enumerate(pieces) if len(it) == 1 and it[0] >= 0x80]
    tags = [i for i, it in enumerate(pieces) if it in (b"<think>", b"</think>")]
    return [*spelt[:40], *halves[:40], *tags * 3, *served_model().spec.eos_token_ids]
