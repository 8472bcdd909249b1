"""Perplexity against transformers' own logits, over every kind of window's edge."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rillgate_server.cli.evaluate.command import Material, evaluate
from rillgate_server.cli.evaluate.engine_run import Answer
from rillgate_server.cli.evaluate.perplexity import measure_perplexity, window_requests, windows_of
from rillgate_server.config.settings import Settings, load_settings
from rillgate_server.errors import ConfigError
from rillgate_server.gateway.text.model_text import ModelText
from tests.support.checkpoints import make_checkpoint

DEMO = Path(__file__).parents[3] / "models" / "demo"
CONTEXT = 48
WINDOW = CONTEXT - 1


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random checkpoint with a byte for a token."""
    path = tmp_path_factory.mktemp("evaluate") / "model"
    make_checkpoint(path, "qwen2", vocab_size=264, max_position_embeddings=CONTEXT)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, path / name)
    return path


@pytest.fixture(scope="module")
def settings(model_dir: Path) -> Settings:
    """Return settings whose chunks are shorter than a window, and their queue than its requests."""
    batcher = {
        "max_step_tokens": "20",
        "max_prefill_chunk_tokens": "10",
        "max_running": "2",
        "max_waiting_requests": "1",
    }
    overrides = {
        "model": {"path": str(model_dir), "dtype": "float32"},
        "batcher": batcher,
        "replica": {"num_threads": "1"},
        "cache": {"block_size_tokens": "4"},
    }
    return load_settings(None, overrides)


def reference_nll(model_dir: Path, token_ids: list[int]) -> float:
    """Score token after token, each with what its window has before it. Slow and obvious."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    stride = WINDOW // 2
    total = 0.0
    for position in range(1, len(token_ids)):
        start = 0
        while start + WINDOW <= position:  # the first window that has it
            start += stride
        with torch.no_grad():
            logits = model(torch.tensor([token_ids[start:position]])).logits[0, -1]
        total -= float(logits.double().log_softmax(-1)[token_ids[position]])
    return total / (len(token_ids) - 1)


@pytest.mark.parametrize("num_tokens", [2, WINDOW, WINDOW + 1, WINDOW + WINDOW // 2, 3 * WINDOW])
def test_perplexity_is_that_of_transformers(
    model_dir: Path, settings: Settings, num_tokens: int
) -> None:
    """Texts of one window and of several, up to its edge and one beyond."""
    text = ModelText.load(model_dir)
    characters = "".join(chr(97 + (i * i) % 23) for i in range(num_tokens - 1))
    token_ids = text.encode_prompt(characters)  # the first mark, then a byte each
    assert len(token_ids) == num_tokens
    material = Material(text, (), tuple(token_ids), "text", 1)
    (row,) = evaluate([settings], model_dir, material)
    assert row.perplexity is not None
    assert row.perplexity.num_tokens == num_tokens - 1
    expected = reference_nll(model_dir, token_ids)
    assert row.perplexity.mean_nll == pytest.approx(expected, rel=1e-5)
    assert row.perplexity.value == pytest.approx(math.exp(expected), rel=1e-4)
    assert row.scores == {}


@pytest.mark.parametrize("max_window_tokens", [2, 3, 8, 9])
def test_every_token_but_the_first_is_scored_once(max_window_tokens: int) -> None:
    """With half a window before it, or all of the text."""
    for num_tokens in range(2, 60):
        windows = windows_of(num_tokens, max_window_tokens)
        scored = [i for it in windows for i in range(it.first_scored, it.end)]
        assert scored == list(range(1, num_tokens))
        assert all(it.end - it.start <= max_window_tokens for it in windows)
        for it in windows[1:]:
            assert it.first_scored - it.start >= max_window_tokens // 2


def test_a_window_that_failed_gives_no_number() -> None:
    """NaN logits end its request, and what is missing must not count as predicted."""
    windows, _ = window_requests(list(range(10)), 8, "text")
    failed = {i: Answer(failure="NaN") for i in range(len(windows))}
    assert math.isnan(measure_perplexity(windows, failed).mean_nll)
    assert math.isnan(measure_perplexity(windows, failed).value)


def test_a_text_without_two_tokens_is_refused() -> None:
    """There is nothing that the first token could be predicted from."""
    with pytest.raises(ConfigError, match="FILE has 1 tokens, and the context 8; allowed: at"):
        window_requests([5], 8, "FILE")
