"""When an answer counts as right."""

from pathlib import Path

import pytest

from rillgate_server.cli.evaluate.engine_run import Answer
from rillgate_server.cli.evaluate.exact_match import Score, count_right, task_requests
from rillgate_server.cli.evaluate.task_file import Task
from rillgate_server.core.checkpoint import read_model_spec
from rillgate_server.gateway.text.chat_template import ChatTurn
from rillgate_server.gateway.text.model_text import ModelText

DEMO = Path(__file__).parents[3] / "models" / "demo"
EOS = 257


@pytest.mark.parametrize(
    ("said", "is_right"),
    [
        ("I think.\n</think>\n\n2 + 2 = 4", True),
        ("</think>2 + 2 = 4\n", True),
        ("I think.</think>2 + 2 = 4.", False),
        ("I think.</think>2 + 2 = 5", False),
        ("2 + 2 = 4</think>", False),
        ("2 + 2 = 4", False),  # the reasoning never ended
        ("", False),
    ],
)
def test_the_answer_behind_the_reasoning_must_be_exactly_the_right_one(
    said: str, is_right: bool
) -> None:
    """White space around it aside; the end's own token is no text."""
    text, spec = ModelText.load(DEMO), read_model_spec(DEMO)
    tasks = [Task("sums", (ChatTurn("user", "2+2"),), "2 + 2 = 4", "file, line 1")]
    requests = task_requests(tasks, text, spec, 64)
    ids = text.encode_prompt(said)[1:] if said else []
    answers = {0: Answer([*ids, EOS])}
    assert count_right(tasks, requests, answers, text) == {"sums": Score(int(is_right), 1)}


def test_each_kind_has_its_score_and_its_request() -> None:
    """Kinds in the order in which they come; a request's length is that of the context at most."""
    text, spec = ModelText.load(DEMO), read_model_spec(DEMO)
    tasks = [Task(kind, "x", "a", "") for kind in ("two", "one", "two")]
    requests = task_requests(tasks, text, spec, 4096)
    assert [request.request_id for request in requests] == [0, 1, 2]
    assert {request.max_tokens for request in requests} == {spec.max_context_tokens - 2}
    answers = {0: Answer([97]), 1: Answer([98]), 2: Answer(failure="NaN")}
    scores = count_right(tasks, requests, answers, text)
    assert list(scores.items()) == [("two", Score(1, 2)), ("one", Score(0, 1))]
    assert scores["two"].percent == 50
