"""Mixed requests, and what a real worker answers to them with and without speculation."""

import random
from dataclasses import replace

import pytest

from rillgate_server.config.groups import SpeculationConfig
from rillgate_server.core.model_spec import CacheSizes
from rillgate_server.core.request import ChoiceStart, Request
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import StepPlan, StepResult
from rillgate_server.engine.executor import Executor
from rillgate_server.scheduler.scheduler import Scheduler
from rillgate_server.worker.worker import Worker
from tests.support.checkpoints import VOCAB_SIZE
from tests.support.engine_run import BATCHER, NUM_HOST_BLOCKS, SWAPPING, Got, Run
from tests.support.equality import mixed_prompts
from tests.support.worker_fixtures import NUM_BLOCKS as MANY_BLOCKS

NUM_BLOCKS = 38
SAMPLINGS = (
    SamplingParams(0, temperature=0.0),
    SamplingParams(1, temperature=0.7, num_logprobs=2),
    SamplingParams(2, top_p=0.8, logit_bias=((7, 5.0), (9, -50.0))),
    SamplingParams(3, top_k=5, repetition_penalty=1.3, num_logprobs=0),
    SamplingParams(4, temperature=0.0, presence_penalty=0.7, frequency_penalty=0.4),
    SamplingParams(5, min_p=0.1, min_tokens=9, banned_until_min_tokens=(4, 5, 6)),
)
Answers = dict[tuple[int, int], Got]


def requests(is_greedy: bool = False) -> list[Request]:
    """Make one of each kind: every sampling, several choices, stop ids, continuations."""
    made = []
    for i, prompt in enumerate(mixed_prompts()):
        if i % 3 == 0:  # text that repeats itself, so that prompt lookup finds something
            prompt = prompt[:9] * 4
        choices = tuple(ChoiceStart(c, (3, 1, 4)[: i % 4]) for c in range(1 + i % 2))
        stop_ids = frozenset({4, 5, 6}) if i % 2 else frozenset()
        sampling = SAMPLINGS[0 if is_greedy else i % len(SAMPLINGS)]
        made.append(Request(i, tuple(prompt), choices, sampling, 20 + i, stop_ids))
    return made


def answer(
    worker: Worker,
    config: SpeculationConfig,
    executor: Executor | None = None,
    host: bool = False,
    is_greedy: bool = False,
) -> tuple[Answers, Run]:
    """Run all requests, a new one per step."""
    num_blocks, num_host = (NUM_BLOCKS, NUM_HOST_BLOCKS) if host else (MANY_BLOCKS, 0)
    worker.allocate_cache(num_blocks, num_host, audit=host)
    sizes = CacheSizes(num_blocks, worker.layout.block_bytes, worker.layout.kv_dtype, num_host)
    cache = replace(SWAPPING, audit=host)
    run = Run(executor or worker, Scheduler(BATCHER, cache, worker.spec, sizes, config))
    for request in requests(is_greedy):
        run.add(request)
        run.step()
    run.finish()
    assert run.scheduler.load(0.0).device.num_blocks_used == 0
    return run.got, run


def assert_equal(got: Answers, expected: Answers) -> None:
    """Compare all tokens, and the log-probabilities up to the order of float32 sums."""
    assert {key: it.tokens for key, it in got.items()} == {
        key: it.tokens for key, it in expected.items()
    }
    for key, it in got.items():
        for ours, theirs in zip(it.logprobs, expected[key].logprobs, strict=True):
            assert ours.token_id == theirs.token_id
            assert ours.logprob == pytest.approx(theirs.logprob, abs=2e-4)
            assert len(ours.top) == len(theirs.top)


def texts_of(answers: Answers) -> list[list[int]]:
    """Join each choice's prompt and answer."""
    return [
        [*request.prompt_token_ids, *answers[request.request_id, choice.index].tokens]
        for request in requests()
        for choice in request.choices
    ]


class TableOfAnswers:
    """An executor with a draft model that knows the answers, and lies now and then."""

    def __init__(self, executor: Executor, texts: list[list[int]], lies: float) -> None:
        self._executor = executor
        self._lies = lies
        self._rng = random.Random(1)
        self._texts = texts
        self._slots: dict[int, list[int]] = {}  # slot -> tokens

    def execute(self, plan: StepPlan) -> StepResult:
        """Pass a plan on, and add proposals to its result."""
        result = self._executor.execute(plan)
        self._slots |= {start.slot: list(start.token_ids) for start in plan.starts}
        proposals = []
        sampling_rows = [row for row in plan.rows if row.samples]
        for row, token_ids in zip(sampling_rows, result.token_ids, strict=True):
            tokens = self._slots[row.slot]
            tokens += token_ids
            proposals.append(tuple(self._propose(tokens)[: row.num_proposals]))
        return replace(result, proposals=tuple(proposals) if any(proposals) else ())

    def _propose(self, tokens: list[int]) -> list[int]:
        known = len(tokens)
        texts = [text for text in self._texts if text[:known] == tokens] or [[]]
        rest = self._rng.choice(texts)[known : known + 9] or [1] * 9
        return [
            self._rng.randrange(VOCAB_SIZE) if self._rng.random() < self._lies else token
            for token in rest
        ]
