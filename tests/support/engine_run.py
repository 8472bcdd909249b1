"""The engine over a real worker on a virtual clock, its small budgets, and what it answered.

The budgets are small, so that chunking, preemption, swapping and prefix hits really happen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rillgate_server.config.groups import BatcherConfig, CacheConfig
from rillgate_server.core.clock import VirtualClock
from rillgate_server.core.request import ChoiceStart, Request
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import StepOutput, StepPlan, StepResult, TokenLogprobs
from rillgate_server.engine.engine import Engine
from rillgate_server.engine.executor import Executor, PipelinedExecutor
from rillgate_server.scheduler.scheduler import Scheduler
from tests.support.equality import NUM_TOKENS, first_difference, mixed_prompts
from tests.support.reference import Reference
from tests.support.worker_fixtures import BLOCK_SIZE

NUM_BLOCKS = 60
"""The mixed batch needs 170 without sharing: choices are preempted and come back."""
MAX_LOGPROB_ERROR = 2e-4

BATCHER = BatcherConfig(max_step_tokens=24, max_prefill_chunk_tokens=13, max_running=8)
CACHE = CacheConfig(block_size_tokens=BLOCK_SIZE)
SWAPPING = CacheConfig(block_size_tokens=BLOCK_SIZE, load_policy="load", audit=True)
NUM_HOST_BLOCKS = 200


class Recorder:
    """An executor that keeps the plans it passes on."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.plans: list[StepPlan] = []

    def execute(self, plan: StepPlan) -> StepResult:
        """Pass a plan on."""
        self.plans.append(plan)
        return self._executor.execute(plan)


class PipelinedRecorder(Recorder):
    """The same of an executor that takes a plan while it computes one."""

    def __init__(self, executor: PipelinedExecutor) -> None:
        super().__init__(executor)
        self._pipelined = executor
        self.num_begun = self.most_begun = 0

    @property
    def max_plans_in_flight(self) -> int:
        """As the other's."""
        return self._pipelined.max_plans_in_flight

    def begin(self, plan: StepPlan) -> None:
        """Pass a plan on."""
        self.plans.append(plan)
        self._pipelined.begin(plan)
        self.num_begun += 1
        self.most_begun = max(self.most_begun, self.num_begun)

    def finish(self) -> StepResult:
        """Pass a result back."""
        self.num_begun -= 1
        return self._pipelined.finish()


@dataclass
class Got:
    """What came for one choice."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class Run:
    """An engine with its requests' answers."""

    def __init__(self, executor: Executor, scheduler: Scheduler) -> None:
        self.recorder = (
            PipelinedRecorder(executor)
            if isinstance(executor, PipelinedExecutor)
            else Recorder(executor)
        )
        self.scheduler = scheduler
        self.clock = VirtualClock()
        self.engine = Engine(scheduler, self.recorder, self.clock)
        self.got: dict[tuple[int, int], Got] = {}  # (request, choice) -> answer

    def add(self, request: Request) -> None:
        """Hand a request in."""
        assert self.scheduler.add(request, self.clock.now()) is None
        for choice in request.choices:
            self.got[request.request_id, choice.index] = Got(list(choice.generated_token_ids))

    def step(self) -> None:
        """Run one step and check the books."""
        self.clock.advance(0.01)
        self._take(self.engine.step())
        self.scheduler.check_integrity()

    def finish(self) -> None:
        """Run until all is done."""
        for _ in range(10_000):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def _take(self, output: StepOutput | None) -> None:
        if output is None:
            return
        assert not output.failed
        for tokens in output.tokens:
            got = self.got[tokens.request_id, tokens.choice_index]
            assert tokens.token_offset == len(got.tokens)
            got.tokens.extend(tokens.token_ids)
            got.logprobs.extend(tokens.logprobs)


def greedy_request(
    request_id: int, prompt: Sequence[int], choices: tuple[ChoiceStart, ...] = (ChoiceStart(0),)
) -> Request:
    """Ask for NUM_TOKENS tokens, whatever they are."""
    sampling = SamplingParams(seed=request_id, temperature=0.0, num_logprobs=20)
    return Request(request_id, tuple(prompt), choices, sampling, NUM_TOKENS)


def differences(run: Run, got: Sequence[Got], expected: Sequence[Reference]) -> list[int]:
    """List the indices of prompts whose tokens are wrong."""
    next_id = 10_000

    def rerun(prompt: Sequence[int], given: Sequence[int]) -> list[int]:
        nonlocal next_id
        next_id += 1
        run.add(greedy_request(next_id, prompt, (ChoiceStart(0, tuple(given)),)))
        run.finish()
        return run.got[next_id, 0].tokens

    return [
        i
        for i, (prompt, answer, reference) in enumerate(
            zip(mixed_prompts()[: len(got)], got, expected, strict=True)
        )
        if first_difference(prompt, answer.tokens, reference, rerun) is not None
    ]


def worst_logprob_error(got: Got, reference: Reference) -> float:
    """Compare the returned alternatives with the reference's logits."""
    expected = reference.logits.log_softmax(dim=-1)
    return max(
        abs(logprob - float(expected[i, token]))
        for i, entry in enumerate(got.logprobs)
        for token, logprob in entry.top
    )


def ask_twice(run: Run, num_prompts: int) -> None:
    """Ask every prompt, and again when the first ones are long gone from the device tier."""
    for first_id in (0, 100):
        for i in range(num_prompts):
            run.add(greedy_request(first_id + i, mixed_prompts()[i]))
            run.step()
        run.finish()
