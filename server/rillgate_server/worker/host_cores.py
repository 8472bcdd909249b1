"""How many cores this process may compute on.

A team of threads is as slow as its slowest: one that shares a core with another, or that a
container's limit stops in the middle of a step, holds all of them up. So a core counts once however
many threads it offers, and no more cores count than the limit is worth.
"""

import os
from collections.abc import Iterable
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_PROCESSORS = Path("/sys/devices/system/cpu")


def usable_cores(
    own: Iterable[int] | None = None, cgroup: Path = _CGROUP, processors: Path = _PROCESSORS
) -> int:
    """Return the cores that the affinity mask and the container's limit leave, at least 1.

    own: the mask's processors by number; None: this process's.
    """
    cores = _num_cores(os.sched_getaffinity(0) if own is None else own, processors)
    limit = _limit(cgroup)
    return cores if limit is None else max(1, min(cores, int(limit)))


def _num_cores(own: Iterable[int], processors: Path) -> int:
    """Count the cores that hold these processors; each its own where the machine does not say."""
    cores = set()
    for number in own:
        try:
            path = processors / f"cpu{number}" / "topology" / "thread_siblings_list"
            cores.add(path.read_text().strip())
        except OSError:
            cores.add(str(number))
    return len(cores)


def _limit(cgroup: Path) -> float | None:
    """Return how many processors' time the container may use; None: any."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:  # the first version of cgroups
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not (quota.isdecimal() and period.isdecimal() and int(period)):  # "max", "-1"
        return None
    return int(quota) / int(period)
