"""What needs an NVIDIA GPU: skipped without one, and a table of what was found at the end."""

from collections.abc import Callable

import pytest
import torch

from tests.support.worker_fixtures import checkpoint, one_thread, reference

__all__ = ["checkpoint", "one_thread", "reference"]

_ROW = "gpu-check"
_OUTCOMES = ("passed", "failed", "error", "skipped")

Note = Callable[[str], None]


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The first GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", 0)


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Note:
    """Return a function that puts a measured figure into the test's row."""
    return lambda text: record_property(_ROW, text)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print a row per check, where these checks alone were asked for."""
    if not any("tests/gpu" in argument for argument in config.args):
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    terminalreporter.section(f"gpu-check: {device}")
    for outcome in _OUTCOMES:
        for report in terminalreporter.stats.get(outcome, []):
            is_own = "tests/gpu" in report.nodeid or outcome in ("failed", "error")
            if is_own and (report.when == "call" or outcome != "passed"):
                terminalreporter.line(f"{_title(report):<66} {outcome}{_finding(report)}")


def _title(report: pytest.TestReport) -> str:
    """Return the sentence that the test's name is."""
    return report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")


def _finding(report: pytest.TestReport) -> str:
    """Return what was measured, or why it was skipped."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return ": " + report.longrepr[2].removeprefix("Skipped: ")
    return "".join(f": {text}" for name, text in report.user_properties if name == _ROW)
