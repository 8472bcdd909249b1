"""Runs every check of `make lint`, all of them even when one fails, and says which failed.

Owns the list of checks. Knows nothing of their rules: those are in pyproject.toml, buf.yaml and the
checks themselves.

    python -m tools.lint [NAME ...]            default: every check
"""

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_BIN = Path(sys.executable).parent

CHECKS: dict[str, tuple[str, ...]] = {
    # name -> command
    "ruff": (str(_BIN / "ruff"), "check", "--quiet", "."),
    "format": (str(_BIN / "ruff"), "format", "--check", "--quiet", "."),
    "mypy": (str(_BIN / "mypy"),),
    "floors": (str(_BIN / "lint-imports"), "--no-logo"),
    "size": (sys.executable, "-m", "tools.check_size"),
    "buf": (str(_BIN / "node"), "node_modules/.bin/buf", "lint"),
    "stubs": (sys.executable, "-m", "tools.generate_stubs", "--check"),
}


def run_check(name: str, command: Sequence[str]) -> bool:
    """Run one check, show its output if it fails, and return whether it passed."""
    began_s = time.monotonic()
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    passed = outcome.returncode == 0
    print(f"{name:<8} {'ok' if passed else 'FAILED':<7} {time.monotonic() - began_s:5.1f} s")
    if not passed:
        print(outcome.stdout + outcome.stderr)
    sys.stdout.flush()
    return passed


def run_checks(checks: Mapping[str, Sequence[str]]) -> int:
    """Run every check, also after one failed; return the exit status."""
    failed = [name for name, command in checks.items() if not run_check(name, command)]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def main(names: Sequence[str]) -> int:
    """Run the named checks, or all; return the exit status."""
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        print(f"no such check: {', '.join(unknown)}; there are: {', '.join(CHECKS)}")
        return 2
    return run_checks({name: CHECKS[name] for name in names or CHECKS})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
