"""`rillgate evaluate`: held-out tasks and perplexity, a row of the table for each setting.

Owns the order of things and what people see while they go on.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rillgate_server.cli.evaluate.engine_run import EngineRun
from rillgate_server.cli.evaluate.exact_match import Score, count_right, task_requests
from rillgate_server.cli.evaluate.models import opened_model
from rillgate_server.cli.evaluate.perplexity import (
    Perplexity,
    measure_perplexity,
    window_requests,
)
from rillgate_server.cli.evaluate.report import Row, json_of, table_of
from rillgate_server.cli.evaluate.task_file import (
    TASK_FILE,
    Task,
    read_tasks,
    read_text,
    take_evenly,
)
from rillgate_server.cli.evaluate.variants import read_variants
from rillgate_server.config.settings import Settings
from rillgate_server.core.model_spec import ModelSpec
from rillgate_server.errors import ConfigError
from rillgate_server.gateway.text.model_text import ModelText
from rillgate_server.replica.process import ReadyModel
from rillgate_server.service.log_events import configure_logging

_PROGRESS_S = 5.0
"""Between two lines."""


@dataclass(frozen=True, slots=True)
class Material:
    """What every row is measured on."""

    text: ModelText
    tasks: tuple[Task, ...]
    token_ids: tuple[int, ...]
    """Of the text for perplexity; empty: none is measured."""
    text_path: str
    max_tokens: int
    """Most of an answer, reasoning included."""


def run_evaluate(settings: Settings, model_dir: Path, args: argparse.Namespace) -> int:
    """Evaluate, print the table, write the JSON; return the exit code.

    Raises ConfigError for files and flags, before anything is loaded, and what loading does.
    """
    configure_logging(settings.log.level)
    variants = read_variants(settings, args.compare)
    material = read_material(model_dir, args)
    if args.json is not None and not args.json.parent.is_dir():
        raise ConfigError(f"--json is {args.json}; allowed: a file in a directory that is there")
    rows = evaluate(variants, model_dir, material)
    print(table_of(rows))
    if material.token_ids:
        print(f"\nperplexity over {len(material.token_ids) - 1} tokens of {material.text_path}")
    if args.json is not None:
        report = {"model": settings.model.name, "rows": [json_of(row) for row in rows]}
        try:
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json {args.json} cannot be written: {error.strerror}") from error
    return 0


def read_material(model_dir: Path, args: argparse.Namespace) -> Material:
    """Read the files that the flags name, or the tasks that the checkpoint brings."""
    task_path = args.tasks
    if task_path is None and (model_dir / TASK_FILE).is_file():
        task_path = model_dir / TASK_FILE
    if task_path is None and args.text is None:
        raise ConfigError(
            f"there is nothing to evaluate: {model_dir} has no {TASK_FILE}; allowed: --tasks "
            "FILE, --text FILE or both"
        )
    if task_path is None and args.num_tasks is not None:
        raise ConfigError(f"--num-tasks is {args.num_tasks}; allowed: none without tasks")
    if args.max_tokens < 1:
        raise ConfigError(f"--max-tokens is {args.max_tokens}; allowed: at least 1")
    tasks = () if task_path is None else take_evenly(read_tasks(task_path), args.num_tasks)
    text = ModelText.load(model_dir)
    token_ids: tuple[int, ...] = ()
    if args.text is not None:
        content = read_text(args.text)
        if not content:
            raise ConfigError(f"{args.text} is empty; allowed: a text of at least two tokens")
        token_ids = tuple(text.encode_prompt(content))
    return Material(text, tasks, token_ids, str(args.text), args.max_tokens)


def evaluate(variants: list[Settings], model_dir: Path, material: Material) -> list[Row]:
    """Load the model as each of the settings says, and measure a row."""
    rows = []
    for number, settings in enumerate(variants, start=1):
        with opened_model(settings, model_dir) as ready:
            names = (settings.model.quantization, ready.spec.dtype, ready.sizes.kv_dtype)
            label = f"row {number} of {len(variants)} ({', '.join(names)} cache)"
            rows.append(_measure(settings, ready, material, label))
    return rows


def _measure(settings: Settings, ready: ReadyModel, material: Material, label: str) -> Row:
    engine = EngineRun(ready, settings)
    began_s = time.monotonic()
    scores, num_failed, num_tokens = _ask(engine, ready.spec, material, label)
    perplexity = _predict(engine, ready.spec, material, label)
    seconds = time.monotonic() - began_s
    num_tokens += len(material.token_ids)
    return Row(
        quantization=settings.model.quantization,
        dtype=ready.spec.dtype,
        kv_dtype=ready.sizes.kv_dtype,
        num_ranks=settings.replica.tensor_parallel_size,
        scores=scores,
        num_failed=num_failed,
        perplexity=perplexity,
        weights=ready.weights,
        tokens_per_s=num_tokens / seconds,
    )


def _ask(
    engine: EngineRun, spec: ModelSpec, material: Material, label: str
) -> tuple[dict[str, Score], int, int]:
    """Return the scores by kind, how many tasks failed, and the tokens of prompts and answers."""
    tasks, text = material.tasks, material.text
    requests = task_requests(tasks, text, spec, material.max_tokens)
    answers = engine.run(requests, _progress(f"{label}: tasks", len(requests)))
    num_failed = sum(bool(answer.failure) for answer in answers.values())
    num_tokens = sum(len(request.prompt_token_ids) for request in requests)
    num_tokens += sum(len(answer.token_ids) for answer in answers.values())
    return count_right(tasks, requests, answers, text), num_failed, num_tokens


def _predict(
    engine: EngineRun, spec: ModelSpec, material: Material, label: str
) -> Perplexity | None:
    if not material.token_ids:
        return None
    windows, requests = window_requests(
        material.token_ids, spec.max_context_tokens, material.text_path
    )
    answers = engine.run(requests, _progress(f"{label}: windows of text", len(requests)))
    return measure_perplexity(windows, answers)


def _progress(what: str, total: int) -> Callable[[int], None]:
    """Return what writes a line now and then, and at the end."""
    last_s = time.monotonic()
    last_done = 0

    def on_done(done: int) -> None:
        nonlocal last_s, last_done
        now_s = time.monotonic()
        if done > last_done and (done == total or now_s - last_s >= _PROGRESS_S):
            last_s, last_done = now_s, done
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    return on_done
