"""The whole engine over a real worker generates exactly what transformers' `generate` gives.

Small budgets and a small cache, so that chunking, preemption, swapping and prefix hits really
happen; the planner-driven tests of the worker show that the comparison can fail.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

from rillgate_server.core.model_spec import CacheSizes
from rillgate_server.core.request import ChoiceStart
from rillgate_server.core.step import CopyDirection, StepPlan, StepResult
from rillgate_server.engine.executor import Executor
from rillgate_server.scheduler.scheduler import Scheduler
from tests.support.checkpoints import KINDS
from tests.support.engine_run import (
    BATCHER,
    CACHE,
    MAX_LOGPROB_ERROR,
    NUM_BLOCKS,
    NUM_HOST_BLOCKS,
    SWAPPING,
    Run,
    ask_twice,
    differences,
    greedy_request,
    worst_logprob_error,
)
from tests.support.equality import NUM_TOKENS, mixed_prompts
from tests.support.worker_fixtures import (
    BLOCK_SIZE,
    MakeCheckpoint,
    MakeReference,
    load_worker,
)

Fault = Callable[[StepPlan], StepPlan]


class Spoiler:
    """An executor that gets spoiled plans."""

    def __init__(self, executor: Executor, fault: Fault) -> None:
        self._executor = executor
        self._fault = fault

    def execute(self, plan: StepPlan) -> StepResult:
        """Spoil a plan and pass it on."""
        return self._executor.execute(self._fault(plan))


def make_run(
    checkpoint: MakeCheckpoint, kind: str, num_blocks: int = NUM_BLOCKS, fault: Fault | None = None
) -> Run:
    """Build an engine over a real worker; `fault` spoils plans on their way to it."""
    worker = load_worker(checkpoint(kind), num_blocks=num_blocks)
    sizes = CacheSizes(num_blocks, worker.layout.block_bytes, worker.layout.kv_dtype)
    scheduler = Scheduler(BATCHER, CACHE, worker.spec, sizes)
    return Run(worker if fault is None else Spoiler(worker, fault), scheduler)


@contextmanager
def swapping_run(
    checkpoint: MakeCheckpoint, kind: str, fault: Fault | None = None
) -> Iterator[Run]:
    """Give an engine whose small device tier has a host tier beside it."""
    worker = load_worker(checkpoint(kind))
    is_audited = fault is None  # a checksum would show the fault before the tokens do
    worker.allocate_cache(NUM_BLOCKS, NUM_HOST_BLOCKS, is_audited)
    sizes = CacheSizes(
        NUM_BLOCKS, worker.layout.block_bytes, worker.layout.kv_dtype, NUM_HOST_BLOCKS
    )
    cache = replace(SWAPPING, audit=is_audited)
    scheduler = Scheduler(BATCHER, cache, worker.spec, sizes)
    with closing(worker):
        yield Run(worker if fault is None else Spoiler(worker, fault), scheduler)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_through_the_engine_gets_the_tokens_of_generate(
    kind: str, checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """Twelve requests arrive one per step, in chunks, with preemption and prefix hits."""
    _, expected = reference(kind)
    run = make_run(checkpoint, kind)
    for i, prompt in enumerate(mixed_prompts()):
        run.add(greedy_request(i, prompt))
        run.step()
    run.finish()
    load = run.scheduler.load(run.clock.now())
    assert load.num_preemptions > 0
    assert load.num_cached_tokens > 0
    assert load.device.num_blocks_used == 0
    mixed = [
        plan
        for plan in run.recorder.plans
        if any(row.num_tokens > 1 for row in plan.rows)
        and any(row.num_tokens == 1 for row in plan.rows)
    ]
    assert len(mixed) > 10
    assert any(not row.samples for plan in mixed for row in plan.rows)
    got = [run.got[i, 0] for i in range(len(expected))]
    assert differences(run, got, expected) == []
    pairs = zip(got, expected, strict=True)
    errors = [worst_logprob_error(g, e) for g, e in pairs if g.tokens == e.tokens]
    assert len(errors) > 10
    assert max(errors) < MAX_LOGPROB_ERROR


def stale_cached_block(plan: StepPlan) -> StepPlan:
    """Put the block before it in the place of the last block of each prefix hit."""
    hits = {row.slot: row.start // BLOCK_SIZE for row in plan.rows}
    starts = []
    for start in plan.starts:
        num, table = hits[start.slot], start.block_table
        if num > 1:
            table = (*table[: num - 1], table[num - 2], *table[num:])
        starts.append(replace(start, block_table=table))
    return replace(plan, starts=tuple(starts))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stale_block_is_seen_through_the_engine(
    kind: str, checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """The comparison above turns red when prefix hits end with a wrong block."""
    _, expected = reference(kind)
    run = make_run(checkpoint, kind, fault=stale_cached_block)
    for i, prompt in enumerate(mixed_prompts()):
        run.add(greedy_request(i, prompt))
        run.step()
    run.finish()
    assert differences(run, [run.got[i, 0] for i in range(len(expected))], expected)


@pytest.mark.parametrize("kind", ["llama", "mistral", "deepseek_v3"])
def test_the_same_prompts_again_hit_the_cache_and_get_the_same_tokens(
    kind: str, checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """A warm cache changes nothing but the work."""
    _, expected = reference(kind)
    run = make_run(checkpoint, kind, num_blocks=400)
    for i, prompt in enumerate(mixed_prompts()):
        run.add(greedy_request(i, prompt))
    run.finish()
    before = run.scheduler.load(run.clock.now()).num_cached_tokens
    for i, prompt in enumerate(mixed_prompts()):
        run.add(greedy_request(100 + i, prompt))
    run.finish()
    hit = run.scheduler.load(run.clock.now()).num_cached_tokens - before
    assert hit > sum(map(len, mixed_prompts())) * 0.7
    for first_id in (0, 100):
        got = [run.got[first_id + i, 0] for i in range(len(expected))]
        assert differences(run, got, expected) == []


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_choices_and_prefixes_from_the_host_tier_get_the_tokens_of_generate(
    kind: str, checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """Every layout of keys and values goes out and comes back whole."""
    _, expected = reference(kind)
    with swapping_run(checkpoint, kind) as run:
        ask_twice(run, len(expected))
        load = run.scheduler.load(run.clock.now())
        assert load.decisions.num_swap_preemptions > 0
        assert load.copies.num_loaded_blocks > 20
        assert (load.copies.num_refused_blocks, load.copies.num_failed_blocks) == (0, 0)
        assert load.device.num_blocks_used == 0
        for first_id in (0, 100):
            got = [run.got[first_id + i, 0] for i in range(len(expected))]
            assert differences(run, got, expected) == []


def next_source(plan: StepPlan) -> StepPlan:
    """Load each block from the host block beside the right one."""
    return replace(
        plan,
        copies=tuple(
            replace(
                job,
                pairs=tuple(((s + 1) % NUM_HOST_BLOCKS, target) for s, target in job.pairs),
            )
            if job.direction is CopyDirection.HOST_TO_DEVICE
            else job
            for job in plan.copies
        ),
    )


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_a_block_loaded_from_a_wrong_place_is_seen_through_the_engine(
    kind: str, checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """The comparison above turns red when loads are off by one."""
    _, expected = reference(kind)
    with swapping_run(checkpoint, kind, fault=next_source) as run:
        ask_twice(run, len(expected))
        assert run.scheduler.load(run.clock.now()).copies.num_loaded_blocks > 20
        got = [run.got[100 + i, 0] for i in range(len(expected))]
        assert differences(run, got, expected)


def test_a_continuation_through_the_engine_goes_on_where_it_stopped(
    checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """Given tokens are replayed, only new ones come, and they are generate's."""
    _, expected = reference("qwen3")
    run = make_run(checkpoint, "qwen3")
    cuts = [1, 5, 19, 10]
    for i, cut in enumerate(cuts):
        given = ChoiceStart(0, tuple(expected[i + 4].tokens[:cut]))
        run.add(greedy_request(i, mixed_prompts()[i + 4], (given,)))
    run.finish()
    for i, cut in enumerate(cuts):
        assert run.got[i, 0].tokens == expected[i + 4].tokens
        assert len(run.got[i, 0].logprobs) == NUM_TOKENS - cut


def test_choices_share_their_prompt_and_each_gets_the_greedy_answer(
    checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """At temperature 0 all choices say the same, and the prompt is computed about once."""
    _, expected = reference("llama")
    run = make_run(checkpoint, "llama", num_blocks=400)
    prompt = mixed_prompts()[7]
    run.add(greedy_request(0, prompt, tuple(ChoiceStart(i) for i in range(4))))
    run.finish()
    for i in range(4):
        assert run.got[0, i].tokens == expected[7].tokens
    computed = sum(row.num_tokens for plan in run.recorder.plans for row in plan.rows)
    assert computed < 1.5 * len(prompt) + 4 * NUM_TOKENS
