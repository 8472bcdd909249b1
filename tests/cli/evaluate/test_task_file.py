"""Task files: what is read, and how a line that cannot be is named."""

from pathlib import Path

import pytest

from rillgate_server.cli.evaluate.task_file import read_tasks, read_text, take_evenly
from rillgate_server.errors import ConfigError
from rillgate_server.gateway.text.chat_template import ChatTurn

GOOD = '{"prompt": "2 + 2 = ", "answer": "4"}'


def test_tasks_are_conversations_or_texts_with_an_answer_and_maybe_a_kind(tmp_path: Path) -> None:
    """Empty lines are passed over; white space around an answer is not part of it."""
    path = tmp_path / "tasks.jsonl"
    chat = '{"messages": [{"role": "user", "content": "Say ü"}], "answer": " ü\\n", "kind": "say"}'
    path.write_text(f"{GOOD}\n\n{chat}\n", encoding="utf-8")
    text, conversation = read_tasks(path)
    assert (text.kind, text.prompt, text.answer) == ("tasks", "2 + 2 = ", "4")
    assert (conversation.kind, conversation.answer) == ("say", "ü")
    assert conversation.prompt == (ChatTurn("user", "Say ü"),)
    assert conversation.where == f"{path}, line 3"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", " is no JSON: "),
        ("[1]", " is [1]; allowed: a JSON object"),
        ('{"prompt": "a", "answer": "b", "reply": "c"}', " has 'reply'; allowed: messages, prompt"),
        ('{"answer": "b"}', " has neither of messages and prompt; allowed: one of them"),
        ('{"prompt": "a", "messages": [], "answer": "b"}', " has both of messages and prompt"),
        ('{"prompt": "a"}', ": answer is missing; allowed: a text that is not empty"),
        ('{"prompt": "a", "answer": " "}', ': answer is " "; allowed: a text that is not'),
        ('{"prompt": 7, "answer": "b"}', ": prompt is 7; allowed: a text that is not empty"),
        ('{"prompt": "a", "answer": "b", "kind": []}', ": kind is []; allowed: a text"),
        ('{"messages": [], "answer": "b"}', ": messages is []; allowed: a list of objects"),
        ('{"messages": [{"role": "user"}], "answer": "b"}', ': messages is [{"role": "user"}]; a'),
    ],
)
def test_a_line_that_is_no_task_is_named(tmp_path: Path, line: str, says: str) -> None:
    """File, line, what is there and what is allowed."""
    path = tmp_path / "tasks.jsonl"
    path.write_text(f"{GOOD}\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_tasks(path)
    assert str(caught.value).startswith(f"{path}, line 2{says}")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Not there, no UTF-8 (with the line), or without a task."""
    path = tmp_path / "file"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_text(path)
    path.write_bytes(b"one\ntwo\n\xff\n")
    with pytest.raises(ConfigError, match="line 3 is no UTF-8"):
        read_text(path)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="has no task"):
        read_tasks(path)


def test_fewer_tasks_are_spread_over_the_file(tmp_path: Path) -> None:
    """So that every kind is asked in a file that has one kind after the other."""
    path = tmp_path / "tasks.jsonl"
    lines = [f'{{"prompt": "{i}", "answer": "a"}}' for i in range(10)]
    path.write_text("\n".join(lines))
    tasks = read_tasks(path)
    assert [task.prompt for task in take_evenly(tasks, 4)] == ["0", "2", "5", "7"]
    assert take_evenly(tasks, None) == take_evenly(tasks, 10) == tasks
    for number in (0, 11):
        with pytest.raises(ConfigError, match=f"--num-tasks is {number}; allowed: 1 to the file's"):
            take_evenly(tasks, number)
