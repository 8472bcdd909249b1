"""Drives a scheduler over a FakeExecutor on a virtual clock, and knows what every answer must be.

The reference answer is made one request at a time, without cache, chunks or batches: so sharing,
chunking, preemption and continuation are right exactly when the answers agree.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rillgate_server.config.groups import BatcherConfig, CacheConfig
from rillgate_server.core.clock import VirtualClock
from rillgate_server.core.model_spec import ModelSpec
from rillgate_server.core.request import (
    ChoiceStart,
    FinishReason,
    Rejection,
    Request,
)
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import (
    ChoiceFinished,
    PromptLogprobs,
    RequestStarted,
    RowPlan,
    StepOutput,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from rillgate_server.engine.executor import Executor
from rillgate_server.engine.testing import FakeExecutor, FakeModel, fake_logprobs
from rillgate_server.scheduler.scheduler import Scheduler

EOS = 1
MODEL = FakeModel(vocab_size=100, eos_token_id=EOS, eos_probability=0.05)
SPEC = ModelSpec(
    name="fake",
    version_digest="00" * 32,
    tokenizer_digest="",
    architecture="Qwen2ForCausalLM",
    vocab_size=MODEL.vocab_size,
    max_context_tokens=512,
    eos_token_ids=(EOS,),
    dtype="float32",
)
STEP_S = 0.01
"""What a step takes on the virtual clock."""


@dataclass(frozen=True, slots=True)
class Limits:
    """A scheduler's settings, small enough that every limit is met."""

    num_blocks: int = 64
    block_size_tokens: int = 4
    max_step_tokens: int = 64
    max_prefill_chunk_tokens: int = 16
    max_running: int = 8
    max_waiting_requests: int = 100
    max_waiting_tokens: int = 10_000
    prefix_caching: bool = True

    def make_scheduler(self) -> Scheduler:
        """Build an idle scheduler."""
        batcher = BatcherConfig(
            max_step_tokens=self.max_step_tokens,
            max_prefill_chunk_tokens=self.max_prefill_chunk_tokens,
            max_running=self.max_running,
            max_waiting_requests=self.max_waiting_requests,
            max_waiting_tokens=self.max_waiting_tokens,
        )
        cache = CacheConfig(
            block_size_tokens=self.block_size_tokens, prefix_caching=self.prefix_caching
        )
        return Scheduler(batcher, cache, SPEC, self.num_blocks)


def make_request(
    request_id: int,
    prompt: Iterable[int] = range(10, 20),
    max_tokens: int = 8,
    choices: Sequence[ChoiceStart] = (ChoiceStart(0),),
    sampling: SamplingParams | None = None,
) -> Request:
    """Build a request with small defaults; what else it needs, `dataclasses.replace` sets."""
    return Request(
        request_id,
        tuple(prompt),
        tuple(choices),
        sampling or SamplingParams(seed=request_id, temperature=0.0),
        max_tokens,
    )


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


class Driver:
    """A scheduler, an executor and a clock, stepped by the test."""

    def __init__(
        self,
        limits: Limits = Limits(),
        *,
        fail_rows: Callable[[RowPlan, Sequence[int]], str | None] | None = None,
        model: FakeModel = MODEL,
    ) -> None:
        """Start idle."""
        self.limits = limits
        self.clock = VirtualClock()
        self.scheduler = limits.make_scheduler()
        self.executor: Executor = FakeExecutor(
            limits.num_blocks, limits.block_size_tokens, model, fail_rows=fail_rows
        )
        self.answers = Answers()
        self.plans: list[StepPlan] = []
        self.outputs: list[StepOutput] = []

    def submit(self, request: Request) -> Rejection | None:
        """Add a request; expects an answer unless it is refused."""
        rejection = self.scheduler.add(request, self.clock.now())
        if rejection is None:
            self.answers.expect(request)
        self.scheduler.check_integrity()
        return rejection

    def abort(self, request_id: int, choice_indices: tuple[int, ...] = ()) -> None:
        """Abort as a caller does who forgets the request at once."""
        self.scheduler.abort(request_id, choice_indices)
        answer = self.answers.of[request_id]
        answer.aborted |= set(choice_indices) - answer.finished.keys()
        if not choice_indices:
            self.answers.gone.add(request_id)
        self.scheduler.check_integrity()

    def begin(self) -> StepPlan | None:
        """Schedule, and check what holds for every plan."""
        plan = self.scheduler.schedule(self.clock.now())
        self.scheduler.check_integrity()
        if plan is not None:
            self._check_plan(plan)
            self.plans.append(plan)
        return plan

    def end(self, plan: StepPlan) -> StepOutput:
        """Execute and update."""
        return self.apply(self.executor.execute(plan))

    def apply(self, result: StepResult) -> StepOutput:
        """Update with a result, and collect what it means."""
        self.clock.advance(STEP_S)
        output = self.scheduler.update(result, self.clock.now())
        self.scheduler.check_integrity()
        self.outputs.append(output)
        self.answers.take(output)
        return output

    def step(self) -> StepOutput | None:
        """Run one whole step; None when nothing is to be computed."""
        plan = self.begin()
        if plan is None:
            self.answers.take(self.scheduler.take_events())
            return None
        return self.end(plan)

    def run(self, max_steps: int = 3000) -> None:
        """Run until nothing is left; a livelock ends in an error."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"still at work after {max_steps} steps: {self.scheduler}")

    def _check_plan(self, plan: StepPlan) -> None:
        assert plan.rows, "an empty plan"
        slots = [row.slot for row in plan.rows]
        assert len(set(slots)) == len(slots), "two rows for one slot"
        num_tokens = sum(row.num_tokens for row in plan.rows)
        assert num_tokens <= self.limits.max_step_tokens, "over the budget"
        assert all(0 <= slot < self.limits.max_running for slot in slots)

    def check_idle(self) -> None:
        """Prove that nothing is held any more."""
        load = self.scheduler.load(self.clock.now())
        assert (load.num_running, load.num_waiting) == (0, 0)
        assert load.device.num_blocks_used == 0
        assert load.device.num_blocks_free + load.device.num_blocks_cached == load.device.num_blocks
        self.scheduler.check_integrity()

    def check_answers(self) -> None:
        """Prove that every request that nobody aborted has exactly its reference answer."""
        for request_id, answer in self.answers.of.items():
            if request_id in self.answers.gone or answer.failure is not None:
                continue
            self._check_prompt_logprobs(answer)
            for choice in answer.wanted:
                assert choice.index in answer.finished, answer
                tokens, reason = reference_answer(answer.request, choice)
                assert tuple(answer.tokens[choice.index]) == tokens, (request_id, choice.index)
                assert answer.finished[choice.index].reason is reason

    def _check_prompt_logprobs(self, answer: Answer) -> None:
        num_top = answer.request.sampling.num_prompt_logprobs
        if num_top is None:
            assert answer.prompt_logprobs is None
        elif any(answer.finished[c.index].num_tokens > len(c.generated_token_ids)
                 for c in answer.wanted):  # fmt: skip
            assert answer.prompt_logprobs is not None
            expected = [fake_logprobs(t, num_top) for t in answer.request.prompt_token_ids[1:]]
            assert list(answer.prompt_logprobs.positions) == expected
