"""The bundled model gives the same tokens whatever the cache does: swap, compute again, or nothing.

A real worker and the real scheduler in float32, without processes between them. The same requests
go through a cache with room for all of them, and through device tiers so small that most choices
are preempted: once with a host tier that they are swapped to, and twice without one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from rillgate_server.config.groups import BatcherConfig, CacheConfig
from rillgate_server.core.clock import SystemClock
from rillgate_server.core.load import EngineLoad
from rillgate_server.core.model_spec import CacheSizes, ModelSpec
from rillgate_server.core.request import ChoiceStart, Request
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import CopyDirection, CopyJob, StepPlan, StepResult
from rillgate_server.engine.engine import Engine
from rillgate_server.engine.executor import Executor
from rillgate_server.scheduler.scheduler import Scheduler
from rillgate_server.worker.worker import Worker, WorkerOptions
from tools.train_demo.evaluate import prompt_ids
from tools.train_demo.tasks import TASKS, Question, held_out_questions, is_correct
from tools.train_demo.tokenizer import build_tokenizer

NUM_REQUESTS = 200
MAX_TOKENS = 64
BLOCK_SIZE = 4
NUM_AMPLE_BLOCKS = 2000
NUM_SMALL_BLOCKS = 112
"""A full batch of 24 needs about 600 in the end, 25 each."""
NUM_HOST_BLOCKS = 2000
BATCHER = BatcherConfig(max_step_tokens=512, max_prefill_chunk_tokens=256, max_running=24)


@dataclass(frozen=True)
class Setting:
    """A cache to run through."""

    num_device_blocks: int
    num_host_blocks: int = 0
    load_policy: str = "load"
    prefix_caching: bool = True
    audit: bool = False


AMPLE = Setting(NUM_AMPLE_BLOCKS)
SMALL = {
    "swapped": Setting(NUM_SMALL_BLOCKS, NUM_HOST_BLOCKS, audit=True),
    "recomputed": Setting(NUM_SMALL_BLOCKS, NUM_HOST_BLOCKS, "recompute"),
    "without prefix caching": Setting(NUM_SMALL_BLOCKS, prefix_caching=False),
}


@dataclass(frozen=True)
class Outcome:
    """What came of the requests, by their number."""

    tokens: tuple[tuple[int, ...], ...]
    num_preemptions: tuple[int, ...]
    load: EngineLoad
    """At the end."""

    @property
    def num_preempted(self) -> int:
        """Requests that were preempted at least once."""
        return sum(count > 0 for count in self.num_preemptions)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    """The bundled model in float32, without a cache yet."""
    torch.set_num_threads(1)
    path = Path(__file__).parents[2] / "models" / "demo"
    it = Worker.load(path, WorkerOptions(dtype="float32", block_size_tokens=BLOCK_SIZE))
    yield it
    it.close()


class Spoiler:
    """An executor that gets spoiled plans."""

    def __init__(self, executor: Executor, spoil: Callable[[StepPlan], StepPlan]) -> None:
        self._executor = executor
        self._spoil = spoil

    def execute(self, plan: StepPlan) -> StepResult:
        """Spoil a plan and pass it on."""
        return self._executor.execute(self._spoil(plan))


@cache
def questions() -> tuple[Question, ...]:
    """Draw held-out questions, of all tasks in turn."""
    of_task = [held_out_questions(task, NUM_REQUESTS // len(TASKS) + 1, seed=3) for task in TASKS]
    drawn = [question for turn in zip(*of_task, strict=True) for question in turn]
    return tuple(drawn[:NUM_REQUESTS])


def make_requests(spec: ModelSpec) -> list[Request]:
    """Ask all questions; every fourth with a temperature."""
    return [
        Request(
            number,
            tuple(prompt_ids(question.prompt)),
            (ChoiceStart(0),),
            SamplingParams(seed=number, temperature=0.0 if number % 4 else 0.8),
            MAX_TOKENS,
            stop_token_ids=frozenset(spec.eos_token_ids),
        )
        for number, question in enumerate(questions())
    ]


def run(
    worker: Worker,
    setting: Setting,
    num_requests: int = NUM_REQUESTS,
    spoil: Callable[[StepPlan], StepPlan] = lambda plan: plan,
) -> Outcome:
    """Hand all requests in at once, and step until all are answered."""
    worker.allocate_cache(setting.num_device_blocks, setting.num_host_blocks, setting.audit)
    cache_config = CacheConfig(
        block_size_tokens=BLOCK_SIZE,
        prefix_caching=setting.prefix_caching,
        load_policy=setting.load_policy,
        audit=setting.audit,
    )
    sizes = CacheSizes(
        setting.num_device_blocks,
        worker.layout.block_bytes,
        "float32",
        setting.num_host_blocks,
    )
    clock = SystemClock()
    scheduler = Scheduler(BATCHER, cache_config, worker.spec, sizes)
    engine = Engine(scheduler, Spoiler(worker, spoil), clock)
    for request in make_requests(worker.spec)[:num_requests]:
        assert scheduler.add(request, clock.now()) is None
    tokens: list[list[int]] = [[] for _ in range(num_requests)]
    num_preemptions = [0] * num_requests
    while scheduler.has_work:
        output = engine.step()
        assert output is None or not output.failed
        for event in output.tokens if output else ():
            tokens[event.request_id] += event.token_ids
        for finished in output.finished if output else ():
            num_preemptions[finished.request_id] = finished.num_preemptions
    scheduler.check_integrity()
    load = scheduler.load(clock.now())
    return Outcome(tuple(map(tuple, tokens)), tuple(num_preemptions), load)


@pytest.fixture(scope="module")
def expected(worker: Worker) -> Outcome:
    """What comes where every request has room."""
    return run(worker, AMPLE)


def test_with_ample_memory_nobody_is_preempted_and_answers_are_right(expected: Outcome) -> None:
    """What the others are compared with is not garbage: short greedy answers are the right ones."""
    assert expected.num_preempted == 0
    assert len(set(expected.tokens)) > 0.9 * NUM_REQUESTS
    tokenizer = build_tokenizer()
    ended = [
        (questions()[number], tokenizer.decode(list(answer), skip_special_tokens=True))
        for number, answer in enumerate(expected.tokens)
        if number % 4 and len(answer) < MAX_TOKENS
    ]
    assert len(ended) > 20
    num_right = sum(is_correct(question, text) for question, text in ended)
    assert num_right >= 0.95 * len(ended)


@pytest.mark.parametrize("name", SMALL)
def test_a_small_device_tier_changes_no_token(worker: Worker, expected: Outcome, name: str) -> None:
    """Most requests are preempted, and go on as if nothing had happened."""
    outcome = run(worker, SMALL[name])
    load = outcome.load
    assert outcome.num_preempted > NUM_REQUESTS / 2
    if name == "swapped":
        assert load.decisions.num_swap_preemptions > NUM_REQUESTS / 2
        assert load.copies.num_loaded_blocks > NUM_REQUESTS
        assert (load.copies.num_failed_blocks, load.copies.num_refused_blocks) == (0, 0)
    else:
        assert load.decisions.num_swap_preemptions == load.copies.num_stored_blocks == 0
    different = [i for i in range(NUM_REQUESTS) if outcome.tokens[i] != expected.tokens[i]]
    assert different == []


def with_shifted_loads(plan: StepPlan) -> StepPlan:
    """Load the block that each of a load's targets should have, into the next one of them."""

    def shifted(job: CopyJob) -> CopyJob:
        if job.direction is CopyDirection.DEVICE_TO_HOST:
            return job
        sources, targets = zip(*job.pairs, strict=True)
        return replace(job, pairs=tuple(zip(sources, targets[1:] + targets[:1], strict=True)))

    return replace(plan, copies=tuple(map(shifted, plan.copies)))


def test_a_wrong_block_in_a_swap_changes_tokens(worker: Worker, expected: Outcome) -> None:
    """The comparison above turns red when loads mix their blocks up."""
    setting = Setting(NUM_SMALL_BLOCKS, NUM_HOST_BLOCKS)
    outcome = run(worker, setting, 48, with_shifted_loads)
    assert outcome.load.copies.num_loaded_blocks > 48
    assert outcome.tokens != expected.tokens[:48]
