"""The settings that keep freed memory; what they save is in docs/performance.md."""

import platform
import subprocess
import sys

import pytest

HEAPS = """
import ctypes, threading
from pathlib import Path
from rillgate_server.worker.allocator import use_one_heap

def is_in_main_heap(address):
    lines = Path("/proc/self/maps").read_text().splitlines()
    (heap,) = [line.split()[0] for line in lines if line.endswith("[heap]")]
    begin, end = (int(it, 16) for it in heap.split("-"))
    return begin <= address < end

def allocate():
    malloc = ctypes.CDLL(None).malloc
    malloc.restype = ctypes.c_void_p
    print(is_in_main_heap(malloc(100_000)))

assert SET_IT
for _ in range(2):
    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
"""
PROGRAM = "from rillgate_server.worker.allocator import keep_freed_memory as keep; print(keep())"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_glibc_takes_the_settings() -> None:
    """It refuses a threshold above its largest one, and then nothing would be kept."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, "True"), ran.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
@pytest.mark.parametrize(("call", "expected"), [("use_one_heap()", True), ("True", False)])
def test_threads_share_one_heap_when_told_to(call: str, expected: bool) -> None:
    """Without, they get heaps that come and go."""
    program = HEAPS.replace("SET_IT", call)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.split("\n")[:2] == [str(expected)] * 2, ran.stderr
