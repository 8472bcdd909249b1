"""Threads are counted by cores: not by what a core offers twice, nor past a container's limit."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from rillgate_server.worker.host_cores import usable_cores


def write(root: Path, files: Mapping[str, str]) -> Path:
    """Write files under a folder."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Four cores of two threads each, as Linux describes them."""
    name = "cpu{}/topology/thread_siblings_list"
    return write(tmp_path / "cpu", {name.format(n): f"{n % 4},{n % 4 + 4}" for n in range(8)})


@pytest.mark.parametrize(
    ("own", "cores"), [(range(8), 4), ((0, 4), 1), ((0, 1, 4), 2), ((1, 2, 3), 3), ((9, 10), 2)]
)
def test_a_core_counts_once(own: Iterable[int], cores: int, machine: Path, tmp_path: Path) -> None:
    """Of the affinity mask; a processor that the machine does not describe is its own core."""
    assert usable_cores(own, tmp_path, machine) == cores


@pytest.mark.parametrize(
    ("limit", "cores"),
    [
        ("max 100000", 4),
        ("200000 100000", 2),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("6400000 100000", 4),
        ("nonsense", 4),
    ],
)
def test_a_container_s_limit_counts_whole_cores(
    limit: str, cores: int, machine: Path, tmp_path: Path
) -> None:
    """Two cores' worth on a large host are two threads; half of one is one."""
    assert usable_cores(range(8), write(tmp_path / "cgroup", {"cpu.max": limit}), machine) == cores


@pytest.mark.parametrize(("quota", "cores"), [("300000", 3), ("-1", 4)])
def test_the_first_version_of_cgroups_counts_too(
    quota: str, cores: int, machine: Path, tmp_path: Path
) -> None:
    """It has a file for each number, and -1 for none."""
    files = {"cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": "100000"}
    assert usable_cores(range(8), write(tmp_path / "cgroup", files), machine) == cores


def test_this_machine_has_some() -> None:
    """However it is described."""
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
