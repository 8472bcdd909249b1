"""`make demo-failover` on the real thing, and what it would not let pass."""

import pytest

from tools import demo_failover
from tools.demo import Question


@pytest.mark.timeout(200)
def test_the_killed_replica_is_missed_by_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    """Three replicas, one killed under running streams, every answer right; exit status 0."""
    assert demo_failover.main() == 0
    shown = capsys.readouterr().out
    assert "$ kill -9 " in shown
    assert shown.count("right") >= len(demo_failover.QUESTIONS)
    assert "streams lost their replica, and went on elsewhere" in shown


def test_a_wrong_answer_and_a_repeated_token_are_no_right_answer() -> None:
    """The demo believes neither."""
    question = Question("What is 1 + 1?", "1 + 1 = 2")
    assert demo_failover.Heard(question, text=" 1 + 1 = 2").is_right
    assert not demo_failover.Heard(question, text="1 + 1 = 3").is_right
    assert not demo_failover.Heard(question, text="1 + 1 = 2", faults=["token 3 after 4"]).is_right
