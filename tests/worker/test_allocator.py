"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import sys
import torch
from rillgate_server.worker.allocator import keep_freed_memory

def step():
    return [torch.zeros(megabytes << 18) for megabytes in (4, 20, 12)]

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    """Count the page faults of twenty steps' buffers in a process of their own."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True)
    if ran.returncode == 3:
        pytest.skip("this C library has no mallopt")
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


def test_the_same_buffers_again_cost_no_page_faults() -> None:
    """Step after step takes and frees the same buffers: kept, they fault a tenth at most."""
    assert page_faults("keep") * 10 < page_faults("default")
