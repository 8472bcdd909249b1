"""The one format of every benchmark's result, `benchmarks/results/<name>.json`.

`rows` hold what was measured, each with its raw `samples`; `ratios` is a flat map of name to
median, which is what aims are read from, and a ratio's name occurs in one file only.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

_NO_COMMIT = "0" * 40

Row = Mapping[str, Any]  # Any: JSON; a row's columns are its benchmark's own


def write_results(
    name: str,
    command: str,
    rows: Sequence[Row],
    ratios: Mapping[str, float],
    packages: Sequence[str] = ("torch", "transformers", "grpcio", "protobuf"),
    directory: Path = RESULTS,
) -> Path:
    """Write one result and return its path. Each row has `samples`, the raw measurements."""
    assert all(row.get("samples") for row in rows), "a row without samples"
    result = {
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | _versions(packages),
        "command": command,
        "other_load": other_load(),
        "rows": list(rows),
        "ratios": {key: round(value, 4) for key, value in ratios.items()},
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def hardware() -> dict[str, str | int | float]:
    """Name processor, cores and memory."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [ln for ln in cpuinfo.read_text().splitlines() if ln.startswith("model name")]
        processor = lines[0].split(":", 1)[1].strip() if lines else processor
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor,
        "cores": os.cpu_count() or 0,
        "memory_gib": round(memory_bytes / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def other_load() -> dict[str, float]:
    """Say how busy the machine is with everything, this benchmark included."""
    one, five, fifteen = os.getloadavg()
    return {"load_1m": round(one, 2), "load_5m": round(five, 2), "load_15m": round(fifteen, 2)}


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            print(f"{package} is not installed", file=sys.stderr)
    return found


def git_commit() -> str:
    """Return the commit that is checked out; zeros in a copy of the tree without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", "server", "client", "protos"
        )
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"the commit is not known: {error}", file=sys.stderr)
        return _NO_COMMIT
