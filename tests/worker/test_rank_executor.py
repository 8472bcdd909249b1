"""A split model's executor: a plan for all ranks, copies that end on all, ranks that are lost.

Rank 0 is this process, the other one a real process with faults of the test's choice.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import CopyDone, CopyJob, RowPlan, SlotStart, StepPlan
from rillgate_server.errors import EngineFailure, RankLost
from rillgate_server.worker.rank_executor import merge_copies, own_part
from tests.support.kv_copies import LOAD, STORE
from tests.support.planner import Job, Planner
from tests.support.ranks import WAIT_S, RankPool, Split, split_model
from tests.support.worker_fixtures import BLOCK_SIZE, MakeCheckpoint, load_worker
from tests.worker.test_model_runner import NEVER_POISON, POISON, poisoned

__all__ = ["poisoned"]

GREEDY = SamplingParams(seed=0, temperature=0.0)
START = SlotStart(0, tuple(range(2, 11)), 9, (1, 2, 3), GREEDY, 0)
PREFILL = StepPlan(0, (START,), (RowPlan(0, 0, 9),))
DECODE = StepPlan(1, (), (RowPlan(0, 9, 1),))
COLLECTIVES_PER_STEP = 8
"""Of a step that samples: the embedding's, two for each of the three layers, the logits'."""


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Where rank 1 comes from."""
    pool = RankPool()
    yield pool
    pool.close()


def stored(step_id: int, copy_id: int, *pairs: tuple[int, int]) -> StepPlan:
    """Make a plan that copies blocks to the host tier and nothing else."""
    return StepPlan(step_id, (), (), copies=(CopyJob(copy_id, STORE, pairs),))


def loaded(step_id: int, copy_id: int, checksums: tuple[int, ...] | None) -> StepPlan:
    """Make a plan that copies host blocks 0 and 1 to device blocks 10 and 11."""
    job = CopyJob(copy_id, LOAD, ((0, 10), (1, 11)), checksums)
    return StepPlan(step_id, (), (), copies=(job,))


def finished(split: Split, plan: StepPlan) -> CopyDone:
    """Execute a plan, and plans without rows until its copy has ended on all ranks."""
    results = [split.executor.execute(plan)]
    while not results[-1].finished_copies:
        results.append(split.executor.execute(StepPlan(plan.step_id + len(results), (), ())))
    (done,) = results[-1].finished_copies
    return done


def test_a_row_that_fails_leaves_all_ranks_with_equal_slots(pool: RankPool, poisoned: Path) -> None:
    """Neighbours get the tokens that they get unsplit, before and after the failure."""
    prompts = [[3, 1, 4, 1, 5], list(range(20, 60))]

    def jobs() -> list[Job]:
        broken = Job([1, 2, POISON, 3, 4, 5, 6, 7, 8, 9], 8, GREEDY, starts_at_step=2)
        return [broken, *(Job(prompt, 12, NEVER_POISON) for prompt in prompts)]

    expected, got = jobs(), jobs()
    Planner(60, BLOCK_SIZE, step_tokens=64, chunk=20).run(load_worker(poisoned), expected)
    with split_model(pool, poisoned) as split:
        Planner(60, BLOCK_SIZE, step_tokens=64, chunk=20).run(split.executor, got)
    assert got[0].failure == "the model gave a NaN or no finite logit"
    assert [job.tokens for job in got] == [job.tokens for job in expected]
    assert len(got[1].tokens) == 12


def test_seeded_sampling_and_prompt_logprobs_are_those_of_the_whole_model(
    pool: RankPool, checkpoint: MakeCheckpoint
) -> None:
    """Rank 0 samples with penalties over its own counts; the head's logits are joined for both."""
    sampling = SamplingParams(
        seed=7, temperature=1.0, presence_penalty=0.5, num_logprobs=3, num_prompt_logprobs=3
    )

    def jobs() -> list[Job]:
        return [Job(list(range(3, 43)), 12, sampling, wants_prompt_logprobs=True)]

    (expected,), (got,) = (expected_jobs, got_jobs) = jobs(), jobs()
    whole = load_worker(checkpoint("qwen3"))
    Planner(60, BLOCK_SIZE, step_tokens=64, chunk=20).run(whole, expected_jobs)
    with split_model(pool, checkpoint("qwen3")) as split:
        Planner(60, BLOCK_SIZE, step_tokens=64, chunk=20).run(split.executor, got_jobs)
    assert got.tokens == expected.tokens
    assert len(got.prompt_logprobs) == 39
    for ours, theirs in zip(got.prompt_logprobs, expected.prompt_logprobs, strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.logprob == pytest.approx(theirs.logprob, abs=2e-4)


def test_a_plan_that_contradicts_the_slots_fails_alone(
    pool: RankPool, checkpoint: MakeCheckpoint
) -> None:
    """All ranks refuse it at the same place and go on; its copies run, and are reported later."""
    with split_model(pool, checkpoint("llama"), num_host_blocks=8) as split:
        before = split.executor.execute(PREFILL)
        job = CopyJob(0, STORE, ((1, 0),))
        with pytest.raises(EngineFailure, match="slot 5 has not been started"):
            split.executor.execute(StepPlan(1, (), (RowPlan(5, 0, 1),), copies=(job,)))
        again = finished(split, StepPlan(2, (), (), ended_slots=(0,)))
        assert (again.copy_id, again.failed_pairs) == (0, ())
        after = split.executor.execute(StepPlan(9, PREFILL.starts, PREFILL.rows))
        assert after.token_ids == before.token_ids


def test_a_copy_that_fails_on_one_rank_has_failed(
    pool: RankPool, checkpoint: MakeCheckpoint
) -> None:
    """All of it when the rank's copier raises, and the message names the rank."""
    with split_model(pool, checkpoint("llama"), num_host_blocks=8, copies="raise") as split:
        done = finished(split, stored(0, 0, (1, 0), (2, 1)))
    assert done.failed_pairs == (0, 1)
    assert done.message == "rank 1: RuntimeError: the bus is broken"
    assert done.checksums == ()


def test_a_block_whose_part_is_wrong_on_one_rank_is_refused(
    pool: RankPool, checkpoint: MakeCheckpoint
) -> None:
    """The audit's checksums are of all parts: rank 1 finds what rank 0 cannot see."""
    with split_model(pool, checkpoint("llama"), num_host_blocks=8, copies="leave out") as split:
        split.executor.execute(PREFILL)
        out = finished(split, stored(1, 0, (1, 0), (2, 1)))
        assert (out.failed_pairs, len(set(out.checksums))) == ((), 2)
        back = finished(split, loaded(20, 1, out.checksums))
    assert (back.failed_pairs, back.num_refused) == ((0,), 1)
    assert back.message == "rank 1: 1 blocks came back with another checksum"


@pytest.mark.parametrize(
    "at",
    [
        pytest.param(3, id="prefill"),
        pytest.param(COLLECTIVES_PER_STEP + 3, id="decode"),
    ],
)
def test_a_rank_that_is_killed_in_a_step_is_lost(
    at: int, pool: RankPool, checkpoint: MakeCheckpoint
) -> None:
    """The step raises RankLost at once, and whoever watches is told."""
    path = checkpoint("llama")
    with split_model(pool, path, at=at, signal=signal.SIGKILL) as split:
        result = split.execute_in_thread(PREFILL)
        if at > COLLECTIVES_PER_STEP:
            assert len(result.result(WAIT_S).token_ids) == 1
            result = split.execute_in_thread(DECODE)
        with pytest.raises(RankLost, match="rank"):
            result.result(WAIT_S)
        assert "rank 1 is gone" in str(split.lost.result(WAIT_S))


def test_a_rank_that_is_killed_in_a_copy_is_lost(
    pool: RankPool, checkpoint: MakeCheckpoint
) -> None:
    """Whether the plan that began it hears so, or a later one."""
    with split_model(pool, checkpoint("llama"), num_host_blocks=8, copies="die") as split:
        with pytest.raises(RankLost, match="rank 1"):
            finished(split, stored(0, 0, (1, 0)))
        assert "rank 1 is gone" in str(split.lost.result(WAIT_S))


def test_an_idle_rank_that_is_killed_is_lost(pool: RankPool, checkpoint: MakeCheckpoint) -> None:
    """Nothing was asked of it; the next plan would be too late."""
    with split_model(pool, checkpoint("llama")) as split:
        split.ranks[0].send(signal.SIGKILL)
        assert "rank 1 is gone" in str(split.lost.result(WAIT_S))
        with pytest.raises(RankLost, match="rank 1"):
            split.executor.execute(PREFILL)


def test_a_rank_that_hangs_in_a_step_is_lost_and_ends_when_it_goes_on(
    pool: RankPool, checkpoint: MakeCheckpoint
) -> None:
    """Rank 0 is in a collective that does not come back; the silence is noticed all the same."""
    with split_model(pool, checkpoint("llama"), at=3, signal=signal.SIGSTOP) as split:
        result = split.execute_in_thread(PREFILL)
        assert "rank 1 hangs: it has been silent for 5 s" in str(split.lost.result(WAIT_S))
        assert not result.done()
    assert split.codes == [1]
    with pytest.raises(RankLost):
        result.result(WAIT_S)


def test_a_rank_that_raises_alone_ends_the_group(
    pool: RankPool, checkpoint: MakeCheckpoint
) -> None:
    """Rank 0 is in a collective that it never enters: no step of this group can be trusted."""
    with split_model(pool, checkpoint("llama"), raises_at=1) as split:
        split.executor.execute(PREFILL)
        with pytest.raises(RankLost, match="rank"):
            split.execute_in_thread(DECODE).result(WAIT_S)
        split.lost.result(WAIT_S)


def test_checksums_of_a_block_are_those_of_its_parts_side_by_side() -> None:
    """What the scheduler keeps as one number per block goes back to each rank as its own."""
    of = {0: CopyDone(3, checksums=(1, 2)), 1: CopyDone(3, checksums=(0xFFFFFFFF, 4))}
    merged = merge_copies(of)
    job = CopyJob(4, LOAD, ((0, 0), (1, 1)), merged.checksums)
    plan = StepPlan(5, (), (), copies=(job,))
    for rank, done in of.items():
        (own,) = own_part(plan, rank).copies
        assert own.checksums == done.checksums


def test_a_merged_copy_is_as_bad_as_its_worst_part() -> None:
    """Failed pairs of all ranks, each refused once; bytes add up, the slowest counts."""
    merged = merge_copies(
        {
            0: CopyDone(3, (1,), 10, 0.5, message="one block", num_refused=1),
            1: CopyDone(3, (1, 2), 20, 0.25, message="two blocks", num_refused=2),
            2: CopyDone(3, (), 30, 0.1, (1, 2, 3)),
        }
    )
    assert merged == CopyDone(
        3, (1, 2), 60, 0.5, (), "rank 0: one block; rank 1: two blocks", num_refused=2
    )
