"""Writes the demo model's held-out tasks and texts, which `rillgate evaluate` measures it on.

    python -m tools.train_demo.held_out                  both files, into models/demo

The tasks are the first of those that `tools.train_demo.evaluate` asks. The texts are other held-out
questions, each as a whole conversation with the reasoning that the model learns to write.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tools.train_demo.tasks import TASKS, Question, held_out_questions
from tools.train_demo.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER

TASK_FILE = "held_out_tasks.jsonl"
TEXT_FILE = "held_out_text.txt"
QUESTIONS_PER_TASK = 100
TEXTS_PER_TASK = 20
_TASK_SEED, _TEXT_SEED = 0, 1


def task_lines(questions_per_task: int = QUESTIONS_PER_TASK) -> str:
    """Return the task file."""
    return "".join(
        json.dumps(
            {
                "kind": task,
                "messages": [{"role": "user", "content": question.prompt}],
                "answer": question.answer,
            },
            ensure_ascii=False,
        )
        + "\n"
        for task in TASKS
        for question in held_out_questions(task, questions_per_task, _TASK_SEED)
    )


def conversation(question: Question) -> str:
    """Return a question with its reasoning and answer as the model sees them."""
    reasoning = f"{THINK}\n{question.reasoning}\n{END_THINK}"
    return f"{USER}{question.prompt}{ASSISTANT}{reasoning}\n\n{question.answer}{EOS}"


def text(texts_per_task: int = TEXTS_PER_TASK) -> str:
    """Return the text file: the tasks in turn. The tokenizer puts the first mark before it."""
    drawn = [held_out_questions(task, texts_per_task, _TEXT_SEED) for task in TASKS]
    parts = [conversation(question) for turn in zip(*drawn, strict=True) for question in turn]
    return BOS.join(parts)


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("models/demo"))
    parser.add_argument("--questions", type=int, default=QUESTIONS_PER_TASK, help="per task")
    arguments = parser.parse_args()
    for name, content in ((TASK_FILE, task_lines(arguments.questions)), (TEXT_FILE, text())):
        (arguments.output / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
