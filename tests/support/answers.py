"""What callers of a scheduler over a FakeExecutor have got, and what they should have got.

The reference answer is made one request at a time, without cache, chunks or batches: so sharing,
chunking, preemption, swapping and continuation are right exactly when the answers agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rillgate_server.core.request import NO_SALT, ChoiceStart, FinishReason, Request
from rillgate_server.core.step import (
    ChoiceFinished,
    PromptLogprobs,
    RequestStarted,
    StepOutput,
    TokenLogprobs,
)
from rillgate_server.engine.testing import FakeModel, fake_logprobs

EOS = 1
MODEL = FakeModel(vocab_size=100, eos_token_id=EOS, eos_probability=0.05)


def reference_answer(
    request: Request, choice: ChoiceStart, model: FakeModel = MODEL
) -> tuple[tuple[int, ...], FinishReason]:
    """Return all tokens of a choice, given ones included, and why it ends: the obvious way."""
    tokens = list(choice.generated_token_ids)
    num_prompt = len(request.prompt_token_ids)
    while True:
        is_long_enough = len(tokens) >= request.sampling.min_tokens
        if tokens and tokens[-1] in request.stop_token_ids and is_long_enough:
            return tuple(tokens), FinishReason.STOP
        if len(tokens) >= request.max_tokens:
            return tuple(tokens), FinishReason.LENGTH
        context = [*request.prompt_token_ids, *tokens]
        tokens.append(model.next_token(context, num_prompt, request.sampling, choice.index))


@dataclass
class Answer:
    """What a caller has got for one request."""

    request: Request
    started: RequestStarted | None = None
    tokens: dict[int, list[int]] = field(default_factory=dict)
    """Choice -> its tokens, given ones included."""
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    finished: dict[int, ChoiceFinished] = field(default_factory=dict)
    prompt_logprobs: PromptLogprobs | None = None
    failure: str | None = None
    aborted: set[int] = field(default_factory=set)
    """Choices of which nothing more may come."""

    @property
    def wanted(self) -> tuple[ChoiceStart, ...]:
        """The choices that must be answered in full."""
        return tuple(c for c in self.request.choices if c.index not in self.aborted)


class Answers:
    """Collects events per request, and checks the promises about their order."""

    def __init__(self) -> None:
        """Start without requests."""
        self.of: dict[int, Answer] = {}
        self.gone: set[int] = set()
        """Aborted requests: nothing may follow for them."""

    def expect(self, request: Request) -> None:
        """Take in a request that was accepted."""
        self.of[request.request_id] = Answer(
            request,
            tokens={c.index: list(c.generated_token_ids) for c in request.choices},
            logprobs={c.index: [] for c in request.choices},
        )

    def take(self, output: StepOutput | None) -> None:
        """Add one output's events."""
        if output is None:
            return
        for started in output.started:
            answer = self._open(started.request_id)
            assert answer.started is None, "started twice"
            num_known = len(answer.request.prompt_token_ids)
            if not any(choice.generated_token_ids for choice in answer.request.choices):
                num_known -= 1  # somebody needs the last prompt token's logits
            assert started.num_cached_tokens <= num_known
            answer.started = started
        for entry in output.prompt_logprobs:
            answer = self._open(entry.request_id)
            assert answer.prompt_logprobs is None, "prompt logprobs twice"
            answer.prompt_logprobs = entry
        for tokens in output.tokens:
            answer = self._open(tokens.request_id)
            assert answer.started is not None, "tokens before started"
            assert tokens.choice_index not in answer.finished, "tokens after finished"
            assert tokens.choice_index not in answer.aborted, "tokens after an abort"
            assert tokens.token_offset == len(answer.tokens[tokens.choice_index]), "a gap"
            answer.tokens[tokens.choice_index] += tokens.token_ids
            answer.logprobs[tokens.choice_index] += tokens.logprobs
        for finished in output.finished:
            answer = self._open(finished.request_id)
            assert answer.started is not None, "finished before started"
            assert finished.choice_index not in answer.finished, "finished twice"
            assert finished.choice_index not in answer.aborted, "finished after an abort"
            assert finished.num_tokens == len(answer.tokens[finished.choice_index])
            answer.finished[finished.choice_index] = finished
        for failed in output.failed:
            self._open(failed.request_id).failure = failed.message

    def _open(self, request_id: int) -> Answer:
        assert request_id not in self.gone, "an event for an aborted request"
        answer = self.of[request_id]
        assert answer.failure is None, "an event for a failed request"
        return answer

    def check(self, block_size_tokens: int) -> None:
        """Prove that every request that nobody aborted has exactly its reference answer."""
        for request_id, answer in self.of.items():
            if request_id in self.gone or answer.failure is not None:
                continue
            _check_prompt_logprobs(answer)
            self._check_hits(answer, block_size_tokens)
            for choice in answer.wanted:
                assert choice.index in answer.finished, answer
                tokens, reason = reference_answer(answer.request, choice)
                assert tuple(answer.tokens[choice.index]) == tokens, (request_id, choice.index)
                assert answer.finished[choice.index].reason is reason

    def _check_hits(self, answer: Answer, size: int) -> None:
        """Prove that a request found no more than somebody with its salt had computed."""
        if answer.started is None:
            return
        own = [_salted(answer, choice.index, size) for choice in answer.request.choices]
        others = [
            _salted(other, index, size)
            for other in self.of.values()
            if other is not answer
            for index in other.tokens
        ]
        num_blocks = max((_num_common(a, b) for a in own for b in others), default=0)
        assert answer.started.num_cached_tokens <= num_blocks * size, (answer.started, num_blocks)
        assert answer.started.num_cached_host_tokens <= answer.started.num_cached_tokens


def _check_prompt_logprobs(answer: Answer) -> None:
    num_top = answer.request.sampling.num_prompt_logprobs
    if num_top is None:
        assert answer.prompt_logprobs is None
    elif any(
        answer.finished[c.index].num_tokens > len(c.generated_token_ids) for c in answer.wanted
    ):
        assert answer.prompt_logprobs is not None
        expected = [fake_logprobs(t, num_top) for t in answer.request.prompt_token_ids[1:]]
        assert list(answer.prompt_logprobs.positions) == expected


def _salted(answer: Answer, choice_index: int, size: int) -> list[tuple[bytes, tuple[int, ...]]]:
    """List a choice's full blocks: each with its salt and its tokens."""
    request = answer.request
    tokens = [*request.prompt_token_ids, *answer.tokens[choice_index]]
    return [
        (
            NO_SALT if end <= request.num_shared_prefix_tokens else request.cache_salt,
            tuple(tokens[end - size : end]),
        )
        for end in range(size, len(tokens) + 1, size)
    ]


def _num_common(a: Sequence[object], b: Sequence[object]) -> int:
    """Return the length of the common beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
