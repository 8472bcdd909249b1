"""What is checked before anything is measured (tests/gpu, and the tests of all Triton kernels): its
table, and how many passed."""

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

from benchmarks.gpu.rows import Row
from benchmarks.results_file import ROOT

_ON_A_GPU_TOO = (
    "tests/worker/test_triton_paged.py",
    "tests/worker/test_device_sampler.py",
    "tests/worker/test_device_runner.py",
    "tests/worker/test_fused_kernels.py",
    "tests/worker/test_rotary_kernel.py",
    "tests/worker/test_gpu_decoder.py",
    "tests/worker/test_int8_triton.py",
    "tests/engine/test_gpu_worker.py",
)
"""Tests that every machine runs, on a GPU where there is one: as quick there as they are long."""
_COMMAND = (sys.executable, "-m", "pytest", "-q", "-r", "fE", "tests/gpu", *_ON_A_GPU_TOO)
_TITLE = re.compile(r"^[=-]+ (gpu-check: .*?) [=-]+$")
_COUNT = re.compile(r"(\d+) (passed|failed|error|skipped)")


def run_checks(
    environment: Mapping[str, str], timeout_s: float, command: Sequence[str] = _COMMAND
) -> tuple[str, Row]:
    """Run them; return their table, and the row that counts them.

    Raises TimeoutError, or RuntimeError where pytest itself fails.
    """
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"took longer than {timeout_s:.0f} s") from error
    print(done.stdout, end="", flush=True)
    counts = count(done.stdout)
    if not counts:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stderr[-500:]}")
    return section(done.stdout), {"what": "checks", **counts, "samples": [counts]}


def section(output: str) -> str:
    """Return the table that tests/gpu/conftest.py prints, with its title."""
    lines = output.splitlines()
    for number, line in enumerate(lines):
        if match := _TITLE.match(line):
            return "\n".join([match.group(1), *lines[number + 1 :]])
    return output


def count(output: str) -> dict[str, int]:
    """Return how many of each outcome the last line says."""
    lines = output.strip().splitlines()
    return {what: int(number) for number, what in _COUNT.findall(lines[-1])} if lines else {}
