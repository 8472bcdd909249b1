"""The settings that keep freed memory; what they save is in docs/performance.md."""

import platform
import subprocess
import sys

import pytest

PROGRAM = "from rillgate_server.worker.allocator import keep_freed_memory as keep; print(keep())"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_glibc_takes_the_settings() -> None:
    """It refuses a threshold above its largest one, and then nothing would be kept."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, "True"), ran.stderr
