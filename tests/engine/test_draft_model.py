"""A draft model beside a real worker changes no token, and knows its slots through all moves."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rillgate_server.config.groups import SpeculationConfig
from rillgate_server.core.model_spec import ModelSpec
from rillgate_server.errors import ConfigError
from rillgate_server.worker.draft_model import check_draft_model
from rillgate_server.worker.worker import Worker, WorkerOptions
from tests.support.checkpoints import make_checkpoint
from tests.support.speculation import Answers, answer, assert_equal
from tests.support.worker_fixtures import BLOCK_SIZE, MakeCheckpoint, load_worker

DRAFTING = SpeculationConfig("draft-model", 4, "a draft model")
OPTIONS = WorkerOptions("float32", block_size_tokens=BLOCK_SIZE)


@pytest.fixture(scope="module")
def plain(checkpoint: MakeCheckpoint) -> Iterator[tuple[Worker, Answers]]:
    """Give a worker, and what it answers without speculation."""
    worker = load_worker(checkpoint("llama"))
    yield worker, answer(worker, SpeculationConfig())[0]
    worker.close()


@pytest.mark.parametrize(("method", "host"), [("draft-model", False), ("auto", True)])
def test_drafts_of_the_model_itself_change_no_token(
    method: str, host: bool, plain: tuple[Worker, Answers], checkpoint: MakeCheckpoint
) -> None:
    """Every sampling, with room and with swapping; many are wrong: they are the likeliest tokens,
    and what is drawn seldom is."""
    worker, expected = plain
    worker.use_draft_model(Worker.load(checkpoint("llama"), OPTIONS))
    got, run = answer(worker, replace(DRAFTING, method=method), host=host)
    assert_equal(got, expected)
    load = run.scheduler.load(0.0)
    assert load.num_accepted_tokens > 0
    if host:
        assert load.decisions.num_swap_preemptions > 0


@pytest.mark.parametrize("host", [False, True])
def test_greedy_answers_of_the_model_itself_are_all_drafted_right(
    host: bool, plain: tuple[Worker, Answers], checkpoint: MakeCheckpoint
) -> None:
    """Every draft is accepted, but for near ties between the kernels of rows and chunks.

    A stale block, or a position that it has not computed, would make it guess.
    """
    worker, _ = plain
    worker.use_draft_model(Worker.load(checkpoint("llama"), OPTIONS))
    expected, _ = answer(worker, SpeculationConfig(), host=host, is_greedy=True)
    got, run = answer(worker, DRAFTING, host=host, is_greedy=True)
    assert_equal(got, expected)
    load = run.scheduler.load(0.0)
    assert load.num_accepted_tokens > 0.97 * load.num_drafted_tokens
    assert load.num_drafted_tokens > 100


@pytest.mark.parametrize(("max_context", "vocab_size"), [(512, 211), (40, 211), (512, 150)])
def test_another_model_changes_no_token(
    max_context: int, vocab_size: int, plain: tuple[Worker, Answers], tmp_path: Path
) -> None:
    """One that is always wrong, whose context is shorter, or which knows fewer tokens."""
    worker, expected = plain
    path = make_checkpoint(
        tmp_path / "draft",
        "qwen2",
        seed=7,
        max_position_embeddings=max_context,
        vocab_size=vocab_size,
    )
    draft = Worker.load(path, OPTIONS)
    draft.spec = replace(draft.spec, tokenizer_digest="one")
    target_spec, worker.spec = worker.spec, replace(worker.spec, tokenizer_digest="one")
    worker.use_draft_model(draft)
    got, run = answer(worker, DRAFTING, host=True)
    worker.spec = target_spec
    assert_equal(got, expected)
    assert run.scheduler.load(0.0).num_drafted_tokens > 0


SPEC = ModelSpec("large", "", "digest", "LlamaForCausalLM", 100, 512, (), "float32")


def test_a_draft_model_needs_the_same_tokens() -> None:
    """By the tokenizer where both have one, else by the vocabulary's size."""
    padded = replace(SPEC, name="small", vocab_size=96)
    check_draft_model(padded, SPEC)
    with pytest.raises(ConfigError, match="small has another tokenizer than large"):
        check_draft_model(replace(padded, tokenizer_digest="other"), SPEC)
    with pytest.raises(ConfigError, match="small has 96 tokens; allowed: 100, as large has"):
        check_draft_model(replace(padded, tokenizer_digest=""), SPEC)
    check_draft_model(replace(SPEC, name="small", tokenizer_digest=""), SPEC)
