"""With the INT8 cache the bundled model answers held-out questions as well as without.

The real scheduler over the real worker, in the model's own bf16, many questions at a time.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from rillgate_server.config.groups import BatcherConfig, CacheConfig
from rillgate_server.core.clock import VirtualClock
from rillgate_server.core.model_spec import CacheSizes
from rillgate_server.core.request import ChoiceStart, Request
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.engine.engine import Engine
from rillgate_server.scheduler.scheduler import Scheduler
from rillgate_server.worker.worker import Worker, WorkerOptions
from tools.train_demo.evaluate import MAX_NEW_TOKENS, prompt_ids
from tools.train_demo.tasks import TASKS, Question, held_out_questions, is_correct
from tools.train_demo.tokenizer import build_tokenizer

MODEL_DIR = Path(__file__).parents[2] / "models" / "demo"
QUESTIONS_PER_TASK = 50
MAX_RUNNING = 64
NUM_BLOCKS = 2048
"""64 contexts of 512 tokens: no question has to wait for memory."""
MAX_DROP = 0.01
"""One point."""


def load(kv_dtype: str) -> Worker:
    """Load the bundled model with that cache."""
    worker = Worker.load(MODEL_DIR, WorkerOptions(kv_dtype=kv_dtype))
    worker.allocate_cache(NUM_BLOCKS)
    return worker


def answer(worker: Worker, questions: Sequence[Question]) -> list[str]:
    """Answer all questions greedily, as many at a time as may run; texts with their reasoning."""
    layout = worker.layout
    scheduler = Scheduler(
        BatcherConfig(max_running=MAX_RUNNING),
        CacheConfig(),
        worker.spec,
        CacheSizes(NUM_BLOCKS, layout.block_bytes, layout.kv_dtype),
    )
    clock = VirtualClock()
    engine = Engine(scheduler, worker, clock)
    stops = frozenset(worker.spec.eos_token_ids)
    for i, question in enumerate(questions):
        request = Request(
            i,
            tuple(prompt_ids(question.prompt)),
            (ChoiceStart(0),),
            SamplingParams(seed=0, temperature=0.0),
            MAX_NEW_TOKENS,
            stops,
        )
        assert scheduler.add(request, clock.now()) is None
    token_ids: list[list[int]] = [[] for _ in questions]
    while scheduler.has_work:
        clock.advance(0.01)
        output = engine.step()
        for tokens in () if output is None else output.tokens:
            token_ids[tokens.request_id].extend(tokens.token_ids)
    tokenizer = build_tokenizer()
    return [
        tokenizer.decode([token for token in ids if token not in stops], skip_special_tokens=False)
        for ids in token_ids
    ]


def count_right(worker: Worker, questions: Sequence[Question]) -> Counter[str]:
    """Count the exactly right answers per task."""
    texts = answer(worker, questions)
    return Counter(
        question.task
        for question, text in zip(questions, texts, strict=True)
        if is_correct(question, text)
    )


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """Questions that the model never saw, of all tasks."""
    return [
        question
        for task in TASKS
        for question in held_out_questions(task, QUESTIONS_PER_TASK, seed=3)
    ]


def test_exact_match_scores_drop_by_at_most_one_point(questions: list[Question]) -> None:
    """Over all tasks; and the scores are high enough for a drop to be seen."""
    exact = count_right(load("auto"), questions).total() / len(questions)
    int8 = count_right(load("int8"), questions).total() / len(questions)
    assert exact > 0.95
    assert int8 >= exact - MAX_DROP
