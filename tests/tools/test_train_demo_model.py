"""The bundled model itself: its size and shape, its reported scores, a sample of its answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from tools.train_demo.evaluate import answer_questions
from tools.train_demo.network import load_model
from tools.train_demo.tasks import TASKS, Question, held_out_questions

MODEL = Path(__file__).parents[2] / "models" / "demo"
# The scores ask for 97 % of 500; a sample of 12 may have one wrong, since bf16 rounds differently
# from one kind of CPU to the next.
SAMPLE = 12

SHOWCASE = {
    "How many r's are in strawberry?": "There are 3 r's in strawberry.",
    "Which is larger, 9.11 or 9.9?": "9.9 is larger than 9.11.",
    "What is 347 + 85?": "347 + 85 = 432",
    "What is 85 - 347?": "85 - 347 = -262",
    "Reverse the word strawberry.": "strawberry reversed is yrrebwarts.",
    "Sort 23, 5, 117.": "Sorted: 5, 23, 117",
}


@pytest.fixture(scope="module")
def network() -> Qwen2ForCausalLM:
    """Load the bundled model in bf16, as it is served."""
    return load_model(MODEL, torch.bfloat16)


def test_the_weights_are_small_and_the_shape_is_qwen2() -> None:
    """At most 10 MB of safetensors, in the architecture that the first models to serve have."""
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert sum(path.stat().st_size for path in MODEL.glob("*.safetensors")) <= 10_000_000


def test_the_reported_scores_reach_97_percent_and_the_card_repeats_them() -> None:
    """evaluation.json holds 500 questions for each of the six tasks; the card says the same."""
    report = json.loads((MODEL / "evaluation.json").read_text(encoding="utf-8"))
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert report["questions_per_task"] == 500
    assert list(report["correct"]) == list(TASKS)
    for task, correct in report["correct"].items():
        assert correct >= 0.97 * 500
        assert f"| {task} | {correct} of 500 |" in card


def test_the_showcase_questions_are_answered_right(network: Qwen2ForCausalLM) -> None:
    """The questions that everybody asks first."""
    questions = [Question("", asked, "", answer, "") for asked, answer in SHOWCASE.items()]
    answers = {one.question.prompt: one.text for one in answer_questions(network, questions)}
    finals = {asked: text.rpartition("</think>")[2].strip() for asked, text in answers.items()}
    assert finals == SHOWCASE


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_of_held_out_questions_is_answered_right(
    network: Qwen2ForCausalLM, task: str
) -> None:
    """Other held-out questions than the reported ones, reasoning first, one wrong at most."""
    answered = answer_questions(network, held_out_questions(task, SAMPLE, seed=2))
    assert sum(one.is_correct for one in answered) >= SAMPLE - 1
    assert all("\n</think>\n\n" in one.text for one in answered if one.is_correct)
