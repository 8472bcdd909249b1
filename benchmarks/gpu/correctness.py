"""What is checked before anything is measured (tests/gpu, and the tests of all Triton kernels): its
table, and how many passed."""

import os
import re
import signal
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
_NOT_COMPILED = "not compile_for_a_gpu and not compiles_what_another"
"""Tests that compile for a GPU without one say nothing new on one."""
_PYTEST = (sys.executable, "-m", "pytest", "-v", "-r", "fE", "-k", _NOT_COMPILED)
COMMAND = (*_PYTEST, "tests/gpu")
KERNELS_COMMAND = (*_PYTEST, *_ON_A_GPU_TOO)
_TITLE = re.compile(r"^[=-]+ (gpu-check: .*?) [=-]+$")
_COUNT = re.compile(r"(\d+) (passed|failed|error|skipped)")


def run_checks(
    environment: Mapping[str, str], timeout_s: float, command: Sequence[str]
) -> tuple[str, Row]:
    """Run them; return their table (of the kernels' tests all that was said), and the row that
    counts them. With whatever they have started they end in time.

    Raises TimeoutError, or RuntimeError where pytest itself fails.
    """
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)  # with servers and ranks that it has started
            output, _ = process.communicate()
            print(output, end="", flush=True)
            raise TimeoutError(f"took longer than {timeout_s:.0f} s") from error
    print(output, end="", flush=True)
    counts = count(output)
    if not counts:
        raise RuntimeError(f"pytest ended with {process.returncode}: {output[-500:]}")
    return section(output), {"what": "checks", **counts, "samples": [counts]}


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
