"""`make demo` with a fake server in the model's place: it believes no wrong answer."""

import sys
from pathlib import Path

import pytest

from tools import demo

_FAKE_SERVE = (sys.executable, str(Path(__file__).parent / "fake_serve.py"))
_RIGHT = tuple(question.answer for question in demo.QUESTIONS)


def test_right_answers_are_shown_with_their_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """Each question, its reasoning, its answer and a row of numbers; exit status 0."""
    assert demo.main((*_FAKE_SERVE, *_RIGHT)) == 0
    shown = capsys.readouterr().out
    for question in demo.QUESTIONS:
        assert f"> {question.text}\nhm\n\n{question.answer}\n" in shown
        assert f"{question.text}  " in shown
    assert "cache blocks: 0 used, 10 kept for later prompts, 90 free of 100" in shown
    assert shown.endswith("stopped\n")


@pytest.mark.parametrize("which", range(3))
def test_one_wrong_answer_fails_the_demo(which: int, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named, and the exit status is 1; almost right is wrong."""
    answers = list(_RIGHT)
    answers[which] += "0"
    assert demo.main((*_FAKE_SERVE, *answers)) == 1
    assert demo.QUESTIONS[which].text in capsys.readouterr().err


def test_a_server_that_dies_at_once_is_reported_with_its_last_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The demo does not wait out its patience for a process that is gone."""
    code = "import sys; sys.exit('no such model')"
    assert demo.main((sys.executable, "-c", code)) == 1
    shown = capsys.readouterr().err
    assert "no such model" in shown
    assert "ended with exit code 1" in shown
