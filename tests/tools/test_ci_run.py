"""`.ci/run` fails when lint or the tests fail, and always ends with the tests' own lines."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("lint_passes", "tests_pass"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_status_and_last_line(tmp_path: Path, lint_passes: bool, tests_pass: bool) -> None:
    """Each of the four outcomes of its two halves, with a Makefile that only plays them."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    (tmp_path / "Makefile").write_text(
        "setup:\n\t@true\n"
        f"lint:\n\t@{'true' if lint_passes else 'false'}\n"
        f"test:\n\t@echo closing line; {'true' if tests_pass else 'false'}\n"
    )
    outcome = subprocess.run(
        ["bash", str(tmp_path / ".ci" / "run")], capture_output=True, text=True, check=False
    )
    assert (outcome.returncode == 0) == (lint_passes and tests_pass)
    assert outcome.stdout.splitlines()[-1] == "closing line"
