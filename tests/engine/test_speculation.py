"""Speculation changes no token: a real worker in float32, with every filter and penalty.

The draft model here is a table of the right answers, which can lie: what a real one proposes is
the worker's (tests/worker). Budgets and cache are small, as in the other tests of the engine.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle

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
from tests.support.worker_fixtures import MakeCheckpoint, load_worker

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
Propose = Callable[[list[int]], Sequence[int]]


def requests() -> list[Request]:
    """Make one of each kind: every sampling, several choices, stop ids, continuations."""
    made = []
    for i, prompt in enumerate(mixed_prompts()):
        if i % 3 == 0:  # text that repeats itself, so that prompt lookup finds something
            prompt = prompt[:9] * 4
        choices = tuple(ChoiceStart(c, (3, 1, 4)[: i % 4]) for c in range(1 + i % 2))
        stop_ids = frozenset({4, 5, 6}) if i % 2 else frozenset()
        sampling = SAMPLINGS[i % len(SAMPLINGS)]
        made.append(Request(i, tuple(prompt), choices, sampling, 20 + i, stop_ids))
    return made


class TableOfAnswers:
    """An executor with a draft model that knows the answers, and lies now and then."""

    def __init__(self, executor: Executor, answers: Answers, lies: float) -> None:
        self._executor = executor
        self._lies = lies
        self._rng = random.Random(1)
        self._texts = [
            [*request.prompt_token_ids, *answers[request.request_id, choice.index].tokens]
            for request in requests()
            for choice in request.choices
        ]
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


def answer(
    worker: Worker,
    config: SpeculationConfig,
    executor: Executor | None = None,
    host: bool = False,
) -> tuple[Answers, Run]:
    """Run all requests, a new one per step."""
    num_blocks, num_host = (NUM_BLOCKS, NUM_HOST_BLOCKS) if host else (MANY_BLOCKS, 0)
    worker.allocate_cache(num_blocks, num_host, audit=host)
    sizes = CacheSizes(num_blocks, worker.layout.block_bytes, worker.layout.kv_dtype, num_host)
    cache = replace(SWAPPING, audit=host)
    run = Run(executor or worker, Scheduler(BATCHER, cache, worker.spec, sizes, config))
    for request in requests():
        run.add(request)
        run.step()
    run.finish()
    assert run.scheduler.load(0.0).device.num_blocks_used == 0
    return run.got, run


@pytest.fixture(scope="module", params=["llama", "qwen2-windows", "deepseek_v3"])
def plain(
    request: pytest.FixtureRequest, checkpoint: MakeCheckpoint
) -> Iterator[tuple[Worker, Answers]]:
    """Give a worker, and what it answers without speculation."""
    worker = load_worker(checkpoint(request.param))
    yield worker, answer(worker, SpeculationConfig())[0]
    worker.close()


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


@pytest.mark.parametrize("method", ["prompt-lookup", "auto"])
@pytest.mark.parametrize("host", [False, True])
def test_prompt_lookup_changes_no_token(
    method: str, host: bool, plain: tuple[Worker, Answers]
) -> None:
    """Mixed requests, with room and with swapping: the same tokens."""
    worker, expected = plain
    got, run = answer(worker, SpeculationConfig(method), host=host)
    assert_equal(got, expected)
    load = run.scheduler.load(0.0)
    assert load.num_drafted_tokens > 0
    if host:
        assert load.decisions.num_swap_preemptions > 0


@pytest.mark.parametrize(("lies", "host"), [(0.0, False), (0.0, True), (0.5, True), (1.0, False)])
def test_right_and_wrong_drafts_change_no_token(
    lies: float, host: bool, plain: tuple[Worker, Answers]
) -> None:
    """Right drafts are accepted, wrong ones cost time alone; logprobs come for each token."""
    worker, expected = plain
    table = TableOfAnswers(worker, expected, lies)
    got, run = answer(worker, SpeculationConfig("draft-model", 5, "a table"), table, host)
    assert_equal(got, expected)
    load = run.scheduler.load(0.0)
    rate = load.num_accepted_tokens / load.num_drafted_tokens
    assert (lies == 0.0) == (rate > 0.8)
    assert (lies == 1.0) == (rate < 0.1)
    if host and lies:  # with right drafts alone nobody stays for long
        assert load.num_preemptions > 0


def test_a_wrong_draft_that_is_kept_would_be_seen(plain: tuple[Worker, Answers]) -> None:
    """The comparison above turns red where a plan's drafts are taken for granted."""
    worker, expected = plain
    noise = cycle(range(VOCAB_SIZE))

    class Gullible:
        """Tells of every draft as if it had been drawn."""

        def execute(self, plan: StepPlan) -> StepResult:
            result = worker.execute(plan)
            rows = [row for row in plan.rows if row.samples]
            return replace(
                result,
                token_ids=tuple(
                    (*row.draft_token_ids, next(noise)) if row.draft_token_ids else token_ids
                    for row, token_ids in zip(rows, result.token_ids, strict=True)
                ),
                logprobs=(),
            )

    with pytest.raises(Exception, match=r"asked for positions|slot|fit not"):
        answer(worker, SpeculationConfig("prompt-lookup"), Gullible())
    assert expected


def test_bf16_gives_more_than_a_token_per_step_on_text_that_repeats_itself(
    checkpoint: MakeCheckpoint,
) -> None:
    """A bias that makes the model loop: most of the answer comes in leaps."""
    worker = load_worker(checkpoint("qwen2"), dtype="bfloat16")
    sizes = CacheSizes(MANY_BLOCKS, worker.layout.block_bytes, worker.layout.kv_dtype)
    config = SpeculationConfig("prompt-lookup")
    run = Run(worker, Scheduler(BATCHER, SWAPPING, worker.spec, sizes, config))
    sampling = SamplingParams(0, temperature=0.0, logit_bias=((7, 100.0),))
    run.add(Request(0, (7,) * 20, (ChoiceStart(0),), sampling, 60))
    run.finish()
    assert run.got[0, 0].tokens == [7] * 60
    assert len(run.recorder.plans) < 20
