"""How much memory this process may still take."""

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(cgroup: Path = _CGROUP) -> int:
    """Return what the machine has, or what the container's limit leaves, whichever is less.

    Page cache counts as available: the kernel gives it up before it refuses memory.
    """
    free_bytes = int(psutil.virtual_memory().available)
    limit, used = _read(cgroup / "memory.max"), _read(cgroup / "memory.current")
    if limit is None or used is None:
        return free_bytes
    return max(0, min(free_bytes, limit - used + _page_cache_bytes(cgroup)))


def spare_bytes(max_memory_bytes: int, num_sharing: int = 1) -> int:
    """Return what is available, at most what this process has left of `max_memory_bytes`.

    0: its part of what is available, where `num_sharing` processes divide that. Processes that
    start side by side need one or the other: each would find the same memory free.
    """
    free_bytes = available_bytes()
    if max_memory_bytes == 0:
        return free_bytes // num_sharing
    return max(0, min(free_bytes, max_memory_bytes - _anonymous_bytes()))


def _anonymous_bytes() -> int:
    """Return what this process holds beside file pages, which the kernel can drop."""
    usage = psutil.Process().memory_info()
    return int(usage.rss - usage.shared)


def _page_cache_bytes(cgroup: Path) -> int:
    """Return the container's file pages that the kernel can drop."""
    try:
        lines = (cgroup / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    found = dict(line.split(maxsplit=1) for line in lines)
    return int(found.get("inactive_file", 0)) + int(found.get("active_file", 0))


def _read(path: Path) -> int | None:
    """Return a limit in bytes; None where there is none."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
