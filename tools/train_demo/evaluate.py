"""Scores the demo model on held-out questions: exact match at greedy in bf16.

    python -m tools.train_demo.evaluate --model models/demo --output models/demo/evaluation.json

Owns the scoring and its report. Questions and the checker come from `tasks`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from transformers import Qwen2ForCausalLM

from tools.train_demo.examples import encode_parts
from tools.train_demo.generate import generate_greedily
from tools.train_demo.network import load_model
from tools.train_demo.tasks import TASKS, Question, held_out_questions, is_correct
from tools.train_demo.tokenizer import ASSISTANT, BOS, THINK, USER, build_tokenizer

# Long enough for the longest reasoning (six numbers to sort: about 190 tokens).
MAX_NEW_TOKENS = 320
_BATCH_QUESTIONS = 125


@dataclass(frozen=True, slots=True)
class Answered:
    """A question and what the model said to it."""

    question: Question
    text: str

    @property
    def is_correct(self) -> bool:
        """Say whether the text ends in exactly the right answer."""
        return is_correct(self.question, self.text)


def prompt_ids(prompt: str) -> list[int]:
    """Return what the chat template makes of one user message."""
    return encode_parts(BOS, USER, prompt, ASSISTANT, THINK, "\n")


def answer_questions(network: Qwen2ForCausalLM, questions: list[Question]) -> list[Answered]:
    """Let the model answer, greedily, in batches of questions of similar length."""
    tokenizer = build_tokenizer()
    ordered = sorted(questions, key=lambda question: len(question.reasoning))
    answered = []
    for start in range(0, len(ordered), _BATCH_QUESTIONS):
        batch = ordered[start : start + _BATCH_QUESTIONS]
        outputs = generate_greedily(
            network, [prompt_ids(question.prompt) for question in batch], MAX_NEW_TOKENS
        )
        answered += [
            Answered(question, tokenizer.decode(ids, skip_special_tokens=False))
            for question, ids in zip(batch, outputs, strict=True)
        ]
    return answered


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--output", type=Path, help="where the JSON report goes; none without it")
    parser.add_argument("--questions", type=int, default=500, help="held-out questions per task")
    parser.add_argument("--seed", type=int, default=0, help="which held-out questions")
    parser.add_argument("--failures", type=int, default=2, help="wrong answers to print per task")
    return parser.parse_args()


def score_task(network: Qwen2ForCausalLM, task: str, arguments: argparse.Namespace) -> int:
    """Ask a task's held-out questions, print score and some failures, return the number right."""
    questions = held_out_questions(task, arguments.questions, arguments.seed)
    wrong = [one for one in answer_questions(network, questions) if not one.is_correct]
    print(f"{task:12} {len(questions) - len(wrong)} of {len(questions)}", flush=True)
    for one in wrong[: arguments.failures]:
        print(f"    asked {one.question.prompt!r}")
        print(f"    said  {one.text!r}")
        print(f"    right {one.question.answer!r}")
    return len(questions) - len(wrong)


def main() -> None:
    """Evaluate, print a line per task, and write the report."""
    arguments = _parse_arguments()
    network = load_model(arguments.model, torch.bfloat16)
    started = time.monotonic()
    correct = {task: score_task(network, task, arguments) for task in TASKS}
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m tools.train_demo.evaluate", *sys.argv[1:]]),
        "decoding": "greedy, bf16, transformers, CPU",
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - started, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "questions_per_task": arguments.questions,
        "correct": correct,
        "exact_match": {task: n / arguments.questions for task, n in correct.items()},
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
