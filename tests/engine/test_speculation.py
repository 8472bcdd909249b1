"""Speculation changes no token: a real worker in float32, with every filter and penalty.

The draft model here is a table of the right answers, which can lie: what a real one proposes is
the worker's (tests/worker). Budgets and cache are small, as in the other tests of the engine.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle

import pytest

from rillgate_server.config.groups import SpeculationConfig
from rillgate_server.core.model_spec import CacheSizes
from rillgate_server.core.request import ChoiceStart, Request
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import StepPlan, StepResult
from rillgate_server.scheduler.scheduler import Scheduler
from rillgate_server.worker.worker import Worker
from tests.support.checkpoints import VOCAB_SIZE
from tests.support.engine_run import BATCHER, SWAPPING, Run
from tests.support.speculation import Answers, TableOfAnswers, answer, assert_equal, texts_of
from tests.support.worker_fixtures import NUM_BLOCKS as MANY_BLOCKS
from tests.support.worker_fixtures import MakeCheckpoint, load_worker


@pytest.fixture(scope="module", params=["qwen2-windows", "deepseek_v3"])
def plain(
    request: pytest.FixtureRequest, checkpoint: MakeCheckpoint
) -> Iterator[tuple[Worker, Answers]]:
    """Give a worker, and what it answers without speculation."""
    worker = load_worker(checkpoint(request.param))
    yield worker, answer(worker, SpeculationConfig())[0]
    worker.close()


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


@pytest.mark.parametrize(("lies", "host"), [(0.0, False), (0.5, True), (1.0, False)])
def test_right_and_wrong_drafts_change_no_token(
    lies: float, host: bool, plain: tuple[Worker, Answers]
) -> None:
    """Right drafts are accepted, wrong ones cost time alone; logprobs come for each token."""
    worker, expected = plain
    table = TableOfAnswers(worker, texts_of(expected), lies)
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
