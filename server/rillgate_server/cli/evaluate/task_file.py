"""Tasks with one right answer each, as a file has them: JSON lines.

    {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4", "kind": "sums"}
    {"prompt": "2 + 2 = ", "answer": "4"}

Owns the format and its errors. Does not know models, nor when an answer counts as right.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rillgate_server.errors import ConfigError
from rillgate_server.gateway.text.chat_template import ChatTurn

TASK_FILE = "held_out_tasks.jsonl"
"""What a checkpoint's directory may have beside its weights."""
_FIELDS = ("messages", "prompt", "answer", "kind")
_NO_KIND = "tasks"


@dataclass(frozen=True, slots=True)
class Task:
    """One question and its one right answer."""

    kind: str
    """Tasks of one kind are counted together."""
    prompt: str | tuple[ChatTurn, ...]
    """A conversation, for the chat template, or a text as it is."""
    answer: str
    """Exactly, but for white space around it; reasoning is no part of it."""
    where: str
    """File and line, for messages."""


def read_tasks(path: Path) -> tuple[Task, ...]:
    """Read a file. Raises ConfigError that names file, line and what is wrong with it."""
    lines = read_text(path).splitlines()
    tasks = tuple(
        _task(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )
    if not tasks:
        raise ConfigError(f"{path} has no task; allowed: at least one line of JSON")
    return tasks


def read_text(path: Path) -> str:
    """Read a text file. Raises ConfigError for one that is not there, or is no UTF-8."""
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line} is no UTF-8: {error.reason}") from error


def take_evenly(tasks: Sequence[Task], num_tasks: int | None) -> tuple[Task, ...]:
    """Take that many, at even distances over the file; None: all."""
    if num_tasks is None:
        return tuple(tasks)
    if not 1 <= num_tasks <= len(tasks):
        raise ConfigError(f"--num-tasks is {num_tasks}; allowed: 1 to the file's {len(tasks)}")
    return tuple(tasks[i * len(tasks) // num_tasks] for i in range(num_tasks))


def _task(line: str, where: str) -> Task:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{where} is {_cut(fields)}; allowed: a JSON object")
    unknown = [name for name in fields if name not in _FIELDS]
    if unknown:
        raise ConfigError(f"{where} has {unknown[0]!r}; allowed: {', '.join(_FIELDS)}")
    if ("messages" in fields) == ("prompt" in fields):
        both = "both" if "prompt" in fields else "neither"
        raise ConfigError(f"{where} has {both} of messages and prompt; allowed: one of them")
    prompt = (
        _text(fields, "prompt", where) if "prompt" in fields else _turns(fields["messages"], where)
    )
    kind = _text(fields, "kind", where) if "kind" in fields else _NO_KIND
    return Task(kind, prompt, _text(fields, "answer", where).strip(), where)


def _text(fields: dict[str, object], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        given = _cut(value) if name in fields else "missing"
        raise ConfigError(f"{where}: {name} is {given}; allowed: a text that is not empty")
    return value


def _turns(value: object, where: str) -> tuple[ChatTurn, ...]:
    turns = value if isinstance(value, list) else []
    if not turns or not all(_is_turn(turn) for turn in turns):
        raise ConfigError(
            f"{where}: messages is {_cut(value)}; allowed: a list of objects with the texts "
            "role and content, at least one"
        )
    return tuple(ChatTurn(turn["role"], turn["content"]) for turn in turns)


def _is_turn(value: object) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"role", "content"}
        and all(isinstance(text, str) for text in value.values())
    )


def _cut(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."
