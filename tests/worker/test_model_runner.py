"""A step's results: prompt log-probabilities across chunk borders, failed rows, odd plans."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import CopyDone, CopyJob, RowPlan, SlotStart, StepPlan
from rillgate_server.errors import EngineFailure
from rillgate_server.worker.attention.sdpa import SdpaAttention
from rillgate_server.worker.kv_tiers import reserve_tiers
from rillgate_server.worker.kv_transfer import KVTransfer
from rillgate_server.worker.model_runner import ModelRunner
from tests.support.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.support.equality import full_row, mixed_prompts
from tests.support.kv_copies import LOAD, PATIENCE_S, STORE, GatedCopier
from tests.support.planner import Job, Planner
from tests.support.reference import load_reference
from tests.support.worker_fixtures import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    MakeCheckpoint,
    load_worker,
)

GREEDY = SamplingParams(seed=0, temperature=0.0)
POISON = 13
"""A token whose embedding is NaN in the poisoned checkpoint."""

NEVER_POISON = SamplingParams(seed=0, temperature=0.0, logit_bias=((POISON, -100.0),))


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a checkpoint with one token that breaks whoever has it in the context."""
    path = make_checkpoint(tmp_path_factory.mktemp("poisoned") / "model", "llama")
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_prompt_logprobs_are_those_of_the_whole_prompt(
    chunk: int, checkpoint: MakeCheckpoint
) -> None:
    """One entry per prompt token from the second on, whatever the chunks' borders."""
    prompt = mixed_prompts()[7]
    sampling = SamplingParams(seed=0, temperature=0.0, num_prompt_logprobs=VOCAB_SIZE)
    asking = Job(prompt, 3, sampling, wants_prompt_logprobs=True)
    neighbour = Job(prompt[:30], 9, GREEDY)
    Planner(NUM_BLOCKS, 4, step_tokens=1100, chunk=chunk).run(
        load_worker(checkpoint("llama")), [neighbour, asking]
    )
    with torch.inference_mode():
        logits = load_reference(checkpoint("llama"))(torch.tensor([prompt])).logits[0]
    expected = torch.log_softmax(logits, dim=-1)
    assert [entry.token_id for entry in asking.prompt_logprobs] == prompt[1:]
    for position, entry in enumerate(asking.prompt_logprobs):
        assert entry.logprob == pytest.approx(
            float(expected[position, prompt[position + 1]]), abs=2e-4
        )
        assert (full_row(entry) - expected[position]).abs().max() < 2e-4
    assert neighbour.prompt_logprobs == []


def test_prompt_logprobs_of_a_replayed_request_end_with_its_prompt(
    checkpoint: MakeCheckpoint,
) -> None:
    """Given tokens are no prompt tokens."""
    sampling = SamplingParams(seed=0, temperature=0.0, num_prompt_logprobs=2)
    job = Job(mixed_prompts()[5], 9, sampling, given=(3, 4, 5), wants_prompt_logprobs=True)
    Planner(NUM_BLOCKS, 4, step_tokens=100, chunk=8).run(load_worker(checkpoint("llama")), [job])
    assert [entry.token_id for entry in job.prompt_logprobs] == list(job.prompt[1:])


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_row_without_a_finite_logit_fails_alone(poisoned: Path, kv_dtype: str) -> None:
    """Its request ends with a message; neighbours' tokens are what they are without it."""
    prompts = [[token for token in prompt if token != POISON] for prompt in mixed_prompts()]
    make = partial(load_worker, poisoned, kv_dtype=kv_dtype)
    alone = [Job(prompt, 8, NEVER_POISON) for prompt in prompts]
    Planner(NUM_BLOCKS, 4, step_tokens=64, chunk=20).run(make(), alone)
    together = [Job(prompt, 8, NEVER_POISON) for prompt in prompts]
    broken = Job([1, 2, POISON, 3, 4, 5, 6, 7, 8, 9], 8, GREEDY)
    jobs = [*together[:6], broken, *together[6:]]
    Planner(NUM_BLOCKS, 4, step_tokens=64, chunk=20).run(make(), jobs)
    assert broken.failure == "the model gave a NaN or no finite logit"
    assert broken.tokens == []
    assert [job.failure for job in together] == [None] * len(together)
    assert [job.tokens for job in together] == [job.tokens for job in alone]


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_blocks_of_a_failed_request_are_safe_to_use_again(poisoned: Path, kv_dtype: str) -> None:
    """Its NaN values lie behind the next holder's tokens, masked but multiplied: they must go."""
    good = [3, 1, 4, 1, 5]
    fresh = Job(good, 10, NEVER_POISON)
    Planner(8, 4, step_tokens=64, chunk=64).run(load_worker(poisoned, kv_dtype=kv_dtype), [fresh])
    worker = load_worker(poisoned, kv_dtype=kv_dtype)
    broken = Job([POISON] * 30, 5, GREEDY)
    later = Job(good, 10, NEVER_POISON, starts_at_step=1)
    Planner(8, 4, step_tokens=64, chunk=64).run(worker, [broken, later])
    assert broken.failure
    assert later.failure is None
    assert later.tokens == fresh.tokens


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_draft_that_breaks_its_position_harms_nobody(poisoned: Path, kv_dtype: str) -> None:
    """Its NaN values lie behind the tokens that are kept: masked, but multiplied."""
    prompt = [3, 1, 4, 1, 5]
    plain = Job(prompt, 8, NEVER_POISON)
    Planner(8, 4, step_tokens=64, chunk=64).run(load_worker(poisoned, kv_dtype=kv_dtype), [plain])
    worker = load_worker(poisoned, kv_dtype=kv_dtype)
    start = SlotStart(0, tuple(prompt), len(prompt), (0, 1, 2, 3), NEVER_POISON, 0)
    tokens = list(worker.execute(StepPlan(0, (start,), (RowPlan(0, 0, 5),))).token_ids[0])
    for step_id in range(1, 8):
        drafts = (POISON, 7, POISON)
        row = RowPlan(0, 4 + step_id, 4, draft_token_ids=drafts)
        result = worker.execute(StepPlan(step_id, (), (row,)))
        assert result.failed_rows == ()
        tokens += result.token_ids[0]
    assert tokens == plain.tokens


def test_drafts_that_do_not_follow_the_known_tokens_are_refused(
    checkpoint: MakeCheckpoint,
) -> None:
    """A wrong plan must not draw at a wrong place, nor look up a token that does not exist."""
    worker = load_worker(checkpoint("llama"))
    start = SlotStart(0, (1, 2, 3), 3, (0, 1), GREEDY, 0)
    worker.execute(StepPlan(0, (start,), (RowPlan(0, 0, 3),)))
    for row in (
        RowPlan(0, 2, 2, draft_token_ids=(7,)),
        RowPlan(0, 3, 2, draft_token_ids=(VOCAB_SIZE,)),
        RowPlan(0, 3, 1, draft_token_ids=(7,)),
        RowPlan(0, 3, 2, samples=False, draft_token_ids=(7,)),
        RowPlan(0, 3, 7, draft_token_ids=(7,) * 6),
    ):
        with pytest.raises(EngineFailure, match="slot 0"):
            worker.execute(StepPlan(1, (), (row,)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drafts_that_are_right_give_the_same_log_probabilities(
    dtype: str, checkpoint: MakeCheckpoint
) -> None:
    """A draft is computed as the decode row that it would be: several tokens in one step."""
    sampling = SamplingParams(seed=0, temperature=0.0, num_logprobs=3)
    prompt = mixed_prompts()[5]
    plain = Job(prompt, 7, sampling)
    worker = load_worker(checkpoint("qwen2"), dtype)
    Planner(NUM_BLOCKS, 4, step_tokens=64, chunk=64).run(worker, [plain])
    worker.allocate_cache(NUM_BLOCKS)
    start = SlotStart(0, tuple(prompt), len(prompt), tuple(range(12)), sampling, 0)
    worker.execute(StepPlan(0, (start,), (RowPlan(0, 0, len(prompt)),)))
    drafts = tuple(plain.tokens[1:6])
    row = RowPlan(0, len(prompt), 6, draft_token_ids=drafts)
    result = worker.execute(StepPlan(1, (), (row,)))
    assert list(result.token_ids[0]) == plain.tokens[1:7]
    assert [it.token_id for it in result.logprobs[0]] == plain.tokens[1:7]
    for ours, theirs in zip(result.logprobs[0], plain.logprobs[1:7], strict=True):
        assert ours.logprob == pytest.approx(
            theirs.logprob, abs=1e-5 if dtype == "float32" else 0.05
        )


def test_a_plan_without_rows_only_ends_slots(checkpoint: MakeCheckpoint) -> None:
    """Its result is empty, and the seat is free."""
    worker = load_worker(checkpoint("llama"))
    start = SlotStart(0, (1, 2, 3), 3, (0,), GREEDY, 0)
    first = worker.execute(StepPlan(0, (start,), (RowPlan(0, 0, 3),)))
    assert len(first.token_ids) == 1
    empty = worker.execute(StepPlan(1, (), (), ended_slots=(0,)))
    assert (empty.step_id, empty.token_ids, empty.failed_rows) == (1, (), ())
    again = worker.execute(StepPlan(2, (start,), (RowPlan(0, 0, 3),)))
    assert again.token_ids == first.token_ids


def test_rows_that_do_not_sample_give_no_tokens(checkpoint: MakeCheckpoint) -> None:
    """One entry per sampling row, in the plan's order; times are measured."""
    worker = load_worker(checkpoint("llama"))
    starts = tuple(SlotStart(i, (1, 2, 3, 4 + i), 4, (i,), GREEDY, 0) for i in range(3))
    rows = (RowPlan(2, 0, 4), RowPlan(0, 0, 2, samples=False), RowPlan(1, 0, 4))
    result = worker.execute(StepPlan(0, starts, rows))
    assert [len(ids) for ids in result.token_ids] == [1, 1]
    assert result.times.model_s > 0
    assert result.logprobs == ()
    none = worker.execute(StepPlan(1, (), (RowPlan(0, 2, 1, samples=False),)))
    assert none.token_ids == ()


def test_a_plan_may_follow_before_the_result_of_the_one_before(checkpoint: MakeCheckpoint) -> None:
    """Plans name positions, not tokens: written ahead, they give what plans made in time give."""
    prompt = mixed_prompts()[3]
    job = Job(prompt, 6, GREEDY)
    Planner(NUM_BLOCKS, 4, step_tokens=64, chunk=64).run(load_worker(checkpoint("qwen2")), [job])
    ahead = load_worker(checkpoint("qwen2"))
    start = SlotStart(0, tuple(prompt), len(prompt), (0, 1, 2), GREEDY, 0)
    plans = [StepPlan(0, (start,), (RowPlan(0, 0, len(prompt)),))]
    plans += [StepPlan(i, (), (RowPlan(0, len(prompt) + i - 1, 1),)) for i in range(1, 6)]
    assert [ahead.execute(plan).token_ids[0][0] for plan in plans] == job.tokens


# -- copies ---------------------------------------------------------------------------------------


@dataclass
class Gated:
    """A runner whose copies wait for the gate."""

    runner: ModelRunner
    copier: GatedCopier

    def wait_for_copy(self, step_id: int) -> CopyDone:
        """Run plans without rows until a copy is reported."""
        for later in range(step_id, step_id + 10_000):
            finished = self.runner.execute(StepPlan(later, (), ())).finished_copies
            if finished:
                (done,) = finished
                return done
        raise AssertionError("no copy ended")


@pytest.fixture
def gated(checkpoint: MakeCheckpoint) -> Iterator[Gated]:
    """A runner over eight blocks in each tier; the gate is shut."""
    worker = load_worker(checkpoint("llama"))
    copier = GatedCopier(reserve_tiers(worker.layout, 8, 8, torch.device("cpu")))
    attention = SdpaAttention(copier.device, torch.float32)
    runner = ModelRunner(
        worker.network, attention, copier.device, KVTransfer(copier), worker.spec.vocab_size
    )
    yield Gated(runner, copier)
    copier.gate.set()
    runner.close()


def test_no_step_waits_for_a_copy(gated: Gated) -> None:
    """Steps are computed while a copy stands still; one without rows gives up after a while."""
    start = SlotStart(0, (1, 2, 3), 3, (0, 1), GREEDY, 0)
    copies = (CopyJob(0, STORE, ((5, 5),)),)
    first = gated.runner.execute(StepPlan(0, (start,), (RowPlan(0, 0, 3),), copies=copies))
    assert gated.copier.begun.wait(PATIENCE_S)
    second = gated.runner.execute(StepPlan(1, (), (RowPlan(0, 3, 1),)))
    empty = gated.runner.execute(StepPlan(2, (), ()))
    assert [len(result.token_ids) for result in (first, second, empty)] == [1, 1, 0]
    assert [result.finished_copies for result in (first, second, empty)] == [(), (), ()]
    gated.copier.gate.set()
    assert gated.wait_for_copy(3).failed_pairs == ()


def test_copies_of_a_step_that_raises_run_and_are_reported_later(gated: Gated) -> None:
    """They begin before anything can fail."""
    gated.copier.gate.set()
    gated.copier.device.bytes[5].fill_(7)
    copies = (CopyJob(0, STORE, ((5, 6),)),)
    with pytest.raises(EngineFailure, match="has not been started"):
        gated.runner.execute(StepPlan(0, (), (RowPlan(3, 0, 1),), copies=copies))
    done = gated.wait_for_copy(1)
    assert (done.copy_id, done.failed_pairs) == (0, ())
    assert (gated.copier.host.bytes[6] == 7).all()


def test_a_report_that_a_failing_step_met_is_not_lost(gated: Gated) -> None:
    """The copy ends before a plan that raises; the plan after that one carries the report."""
    gated.copier.gate.set()
    copies = (CopyJob(0, STORE, ((5, 6),)),)
    start = SlotStart(0, (1, 2, 3), 3, (0,), GREEDY, 0)
    result = gated.runner.execute(StepPlan(0, (start,), (RowPlan(0, 0, 3),), copies=copies))
    finished = list(result.finished_copies)
    with pytest.raises(EngineFailure):
        gated.runner.execute(StepPlan(1, (), (RowPlan(3, 0, 1),)))
    finished = finished or [gated.wait_for_copy(2)]
    assert [done.copy_id for done in finished] == [0]


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("num_loaded", [1, 3])
def test_blocks_that_were_away_give_the_same_tokens(
    kv_dtype: str, num_loaded: int, checkpoint: MakeCheckpoint
) -> None:
    """A prompt's blocks go to the host tier, are overwritten, come back elsewhere, and serve as a
    cached prefix: blocks before a row's start are kept as they are."""
    prompt = mixed_prompts()[7][: 3 * BLOCK_SIZE + 2]
    worker = load_worker(checkpoint("llama"), kv_dtype=kv_dtype)
    worker.allocate_cache(16, 4)
    start = SlotStart(0, tuple(prompt), len(prompt), (0, 1, 2, 3), GREEDY, 0)
    row = RowPlan(0, 0, len(prompt), prompt_logprobs=True)
    expected = worker.execute(StepPlan(0, (start,), (row,)))
    ids = iter(range(1, 10_000))

    def run_copy(job: CopyJob) -> None:
        result = worker.execute(StepPlan(next(ids), (), (), copies=(job,)))
        while not result.finished_copies:
            result = worker.execute(StepPlan(next(ids), (), ()))
        assert result.finished_copies[0].failed_pairs == ()

    run_copy(CopyJob(0, STORE, ((0, 3), (1, 1), (2, 0))))
    other = SlotStart(1, (9,) * 14, 14, (0, 1, 2, 3), GREEDY, 0)
    worker.execute(StepPlan(next(ids), (other,), (RowPlan(1, 0, 14),), ended_slots=(0,)))
    run_copy(CopyJob(1, LOAD, ((3, 9), (1, 5), (0, 12))[:num_loaded]))
    table = (9, 5, 12)[:num_loaded] + (6, 7, 8)[: 4 - num_loaded]
    again = SlotStart(0, tuple(prompt), len(prompt), table, GREEDY, 0)
    begin = num_loaded * BLOCK_SIZE
    plan = StepPlan(next(ids), (again,), (RowPlan(0, begin, len(prompt) - begin),))
    assert worker.execute(plan).token_ids == expected.token_ids
    worker.close()


def test_a_new_cache_ends_the_copies_of_the_one_before(checkpoint: MakeCheckpoint) -> None:
    """Its thread ends; ids begin anew, and nothing is reported that was not begun here."""
    worker = load_worker(checkpoint("llama"))
    for _ in range(3):
        worker.allocate_cache(8, 8, audit=True)
        plan = StepPlan(0, (), (), copies=(CopyJob(0, STORE, ((0, 0), (1, 1))),))
        finished = worker.execute(plan).finished_copies
        while not finished:
            finished = worker.execute(StepPlan(1, (), ())).finished_copies
        assert [len(done.checksums) for done in finished] == [2]
    worker.close()
    with pytest.raises(EngineFailure, match="before allocate_cache"):
        worker.execute(StepPlan(0, (), ()))
