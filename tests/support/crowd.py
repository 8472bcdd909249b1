"""A crowd of streams that go on while somebody breaks things, and what each must have heard.

Owns the questions, what the undisturbed server answers to them, the streams that run, and the
comparison. Does not know what is broken, nor how.
"""

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from rillgate import AsyncClient
from rillgate.errors import RillgateError
from rillgate.types import Chunk, FinishReason, GenerateOptions, TokenLogprobs
from tools.train_demo.tasks import TASKS, held_out_questions, is_correct

NUM_STREAMS = 24
MAX_TOKENS = 400
_STOPS = [f"{digit}@@" for digit in range(10)] + [" @@", "e@@"]
"""Never there, but most texts end with the beginning of one, which is withheld for a token."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    prompt: str
    options: GenerateOptions


@dataclass(slots=True)
class HeardChoice:
    """What a stream gave of one choice."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    reasoning_text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_completion_tokens: int | None = None


@dataclass(slots=True)
class Heard:
    """What one stream gave, and what was wrong with it on the way."""

    asked: Asked
    choices: dict[int, HeardChoice] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    num_resumes: int = 0
    pauses_s: list[float] = field(default_factory=list)
    """Between two chunks of the stream."""

    @property
    def has_token(self) -> bool:
        """Whether any choice has one."""
        return any(choice.token_ids for choice in self.choices.values())

    def take(self, chunk: Chunk) -> None:
        """Add a chunk; its offset must be the number of tokens before it."""
        choice = self.choices.setdefault(chunk.choice_index, HeardChoice())
        if chunk.token_offset != len(choice.token_ids):
            self.faults.append(f"tokens {chunk.token_offset} after {len(choice.token_ids)}")
        if choice.finish_reason is not None:
            self.faults.append("a chunk after the end")
        choice.token_ids += chunk.token_ids
        choice.text += chunk.text
        choice.reasoning_text += chunk.reasoning_text
        choice.logprobs += chunk.logprobs
        choice.finish_reason = chunk.finish_reason
        if chunk.usage is not None:
            choice.num_completion_tokens = chunk.usage.completion_tokens


def differences(heard: Heard, expected: Heard) -> list[str]:
    """Return what is wrong with a stream, in words; nothing when it is as the undisturbed one."""
    found = list(heard.faults)
    if heard.choices.keys() != expected.choices.keys():
        found.append(f"choices {sorted(heard.choices)}, expected {sorted(expected.choices)}")
    for index, wanted in expected.choices.items():
        choice = heard.choices.get(index, HeardChoice())
        for name in (
            *("token_ids", "text", "reasoning_text", "finish_reason", "num_completion_tokens"),
        ):
            got, want = getattr(choice, name), getattr(wanted, name)
            if got != want:
                found.append(f"choice {index}: {name} is {got!r}, expected {want!r}")
        if not _are_close(choice.logprobs, wanted.logprobs):
            found.append(f"choice {index}: other log-probabilities")
    return found


def _are_close(got: Sequence[TokenLogprobs], want: Sequence[TokenLogprobs]) -> bool:
    """Compare; batches of other shapes add up in another order."""
    return len(got) == len(want) and all(
        a.token_id == b.token_id and math.isclose(a.logprob, b.logprob, abs_tol=1e-3)
        for a, b in zip(got, want, strict=True)
    )


async def listen(
    client: AsyncClient, heard: Heard, on_chunk: Callable[[], None] = lambda: None
) -> Heard:
    """Ask, and hear the answer to its end or its error."""
    clock = asyncio.get_running_loop().time
    messages = [{"role": "user", "content": heard.asked.prompt}]
    async with client.stream(messages, **heard.asked.options) as stream:
        try:
            last_s: float | None = None
            async for chunk in stream:
                now_s = clock()
                if last_s is not None:
                    heard.pauses_s.append(now_s - last_s)
                last_s = now_s
                heard.take(chunk)
                on_chunk()
        except RillgateError as error:
            heard.faults.append(f"{type(error).__name__}: {error}")
        heard.num_resumes = stream.num_resumes
    return heard


async def undisturbed(client: AsyncClient) -> list[Heard]:
    """Ask distinct questions in different ways; return what the server answers in peace.

    Only questions that it answers rightly, and only in ways that leave enough to break.
    """
    questions = [
        question
        for task in TASKS
        for question in held_out_questions(task, 2 * NUM_STREAMS // len(TASKS), seed=11)
    ]
    plain = [Asked(it.prompt, {"temperature": 0, "max_tokens": MAX_TOKENS}) for it in questions]
    answers = await asyncio.gather(*(listen(client, Heard(asked)) for asked in plain))
    right = [
        question
        for question, answer in zip(questions, answers, strict=True)
        if not answer.faults and is_correct(question, answer.choices[0].text)
    ]
    by_task = [[it for it in right if it.task == task] for task in TASKS]
    mixed = [it for row in itertools.zip_longest(*by_task) for it in row if it is not None]
    asked = [Asked(it.prompt, _ways(index)) for index, it in enumerate(mixed[:NUM_STREAMS])]
    assert len(asked) == NUM_STREAMS, f"only {len(asked)} questions are answered rightly"
    heard = await asyncio.gather(*(listen(client, Heard(it)) for it in asked))
    assert not [it.faults for it in heard if it.faults]
    return heard


def _ways(index: int) -> GenerateOptions:
    """Return how the question of this number is asked: greedily, seeded, in several choices, …"""
    seeded: GenerateOptions = {"temperature": 0.7, "seed": 1000 + index, "max_tokens": MAX_TOKENS}
    greedy: GenerateOptions = {"temperature": 0, "max_tokens": MAX_TOKENS}
    ways: tuple[GenerateOptions, ...] = (
        greedy,
        {**greedy, "stop": _STOPS},
        {**greedy, "logprobs": 2},
        {**seeded, "n": 2},
        {**seeded, "presence_penalty": 0.3, "frequency_penalty": 0.1, "stop": _STOPS},
        {**seeded, "n": 3, "logprobs": 0, "repetition_penalty": 1.05},
    )
    return ways[index % len(ways)]


class Crowd:
    """Keeps streams running, one after another at each of its places, until it is stopped.

    State: the streams that run, the finished ones.
    """

    def __init__(self, clients: Sequence[AsyncClient], expected: Sequence[Heard]) -> None:
        """Ask by `clients`, in turn, what was asked in peace."""
        self._clients = clients
        self._expected = expected
        self._is_stopping = False
        self._heard = asyncio.Event()
        self.running: dict[int, Heard] = {}  # place -> stream
        self.done: list[tuple[Heard, Heard]] = []
        """(what was heard, what should have been)."""

    @property
    def num_without_token(self) -> int:
        """Streams that run and have received nothing."""
        return sum(not heard.has_token for heard in self.running.values())

    @property
    def num_with_token(self) -> int:
        """Streams that run and have received a token, those of them that have ended left out."""
        return sum(heard.has_token and not _is_over(heard) for heard in self.running.values())

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that streams bring about; looks with every chunk."""
        while not condition():
            self._heard.clear()
            await self._heard.wait()

    @contextlib.asynccontextmanager
    async def running_streams(self) -> AsyncIterator[None]:
        """Run while the block does; at its end every stream that runs is heard to its end."""
        places = [asyncio.create_task(self._keep_asking(place)) for place in range(NUM_STREAMS)]
        try:
            yield
            self._is_stopping = True
            await asyncio.gather(*places)
        finally:
            for task in places:
                task.cancel()
            await asyncio.gather(*places, return_exceptions=True)

    async def _keep_asking(self, place: int) -> None:
        client = self._clients[place % len(self._clients)]
        for turn in itertools.count():
            expected = self._expected[(place + turn) % len(self._expected)]
            heard = self.running[place] = Heard(expected.asked)
            await listen(client, heard, self._heard.set)
            self.done.append((heard, expected))
            if self._is_stopping:
                del self.running[place]
                return

    def differences(self) -> list[str]:
        """Return what was wrong with any finished stream."""
        return [
            f"{heard.asked}: {'; '.join(found)}"
            for heard, expected in self.done
            if (found := differences(heard, expected))
        ]


def _is_over(heard: Heard) -> bool:
    return all(choice.finish_reason is not None for choice in heard.choices.values())
