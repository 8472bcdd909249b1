"""Tasks answered greedily, and counted right where the answer is exactly the right one.

What a caller reads as the answer counts, without reasoning and without white space around it. Owns
the prompts' encoding and the count. Does not know where tasks come from.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rillgate_server.cli.evaluate.engine_run import Answer
from rillgate_server.cli.evaluate.task_file import Task
from rillgate_server.core.model_spec import ModelSpec
from rillgate_server.core.request import ChoiceStart, Request
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.errors import ConfigError, InvalidRequest
from rillgate_server.gateway.text.assembler import TextAssembler
from rillgate_server.gateway.text.model_text import ModelText

_TEMPLATE_TIME_MS = 1_767_225_600_000
"""2026-01-01, for templates that print the date: another day is no other task."""


@dataclass(frozen=True, slots=True)
class Score:
    """How many tasks of a kind, or of all, were answered right."""

    num_right: int
    num_tasks: int

    @property
    def percent(self) -> float:
        """Of the tasks, 0 to 100."""
        return 100 * self.num_right / self.num_tasks


def task_requests(
    tasks: Sequence[Task], text: ModelText, spec: ModelSpec, max_tokens: int
) -> list[Request]:
    """Return a request for each task, numbered from 0.

    Raises ConfigError, with file and line, for one that the model's template or context cannot
    take.
    """
    return [_request(number, task, text, spec, max_tokens) for number, task in enumerate(tasks)]


def _request(number: int, task: Task, text: ModelText, spec: ModelSpec, max_tokens: int) -> Request:
    try:
        if isinstance(task.prompt, str):
            token_ids = text.encode_prompt(task.prompt)
        else:
            token_ids = text.encode_chat(task.prompt, _TEMPLATE_TIME_MS)
    except InvalidRequest as error:
        raise ConfigError(f"{task.where}: {error}") from error
    room = spec.max_context_tokens - len(token_ids)
    if room < 1:
        raise ConfigError(
            f"{task.where}: the prompt has {len(token_ids)} tokens; allowed: at most "
            f"{spec.max_context_tokens - 1} (the context holds {spec.max_context_tokens})"
        )
    return Request(
        number,
        tuple(token_ids),
        (ChoiceStart(0),),
        SamplingParams(seed=0, temperature=0.0),
        min(max_tokens, room),
        frozenset(spec.eos_token_ids),
    )


def count_right(
    tasks: Sequence[Task], requests: Sequence[Request], answers: dict[int, Answer], text: ModelText
) -> dict[str, Score]:
    """Return the score of each kind, in the order in which the kinds come."""
    totals = Counter(task.kind for task in tasks)
    right = Counter(
        task.kind
        for task, request in zip(tasks, requests, strict=True)
        if _answer_text(request, answers[request.request_id], text) == task.answer
    )
    return {kind: Score(right[kind], total) for kind, total in totals.items()}


def _answer_text(request: Request, answer: Answer, text: ModelText) -> str:
    """Return what a caller reads, without reasoning."""
    assembler = TextAssembler(
        text, request.prompt_token_ids, silent_token_ids=request.stop_token_ids
    )
    return (assembler.push(answer.token_ids).text + assembler.finish().text).strip()
