"""`make lint` runs every check and fails if one of them does."""

import sys

import pytest

from tools import lint

PASSES = (sys.executable, "-c", "print('quiet')")
FAILS = (sys.executable, "-c", "import sys; print('what is wrong'); sys.exit(3)")


def test_one_failing_check_fails_the_run_after_all_ran(capsys: pytest.CaptureFixture[str]) -> None:
    """The checks after a failing one still run, and only the failing one's output is shown."""
    assert lint.run_checks({"first": FAILS, "second": PASSES}) == 1
    output = capsys.readouterr().out
    assert "what is wrong" in output
    assert "second   ok" in output
    assert "quiet" not in output
    assert output.splitlines()[-1] == "failed: first"


def test_passing_checks_pass_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing failed: status 0 and one line per check."""
    assert lint.run_checks({"first": PASSES, "second": PASSES}) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_misspelt_check_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is no check runs nothing and says what there is."""
    assert lint.main(["mipy"]) == 2
    assert "mypy" in capsys.readouterr().out
