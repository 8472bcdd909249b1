"""The process that runs parts of one group: loads, asks, and tells each row at once.

    python -m benchmarks.gpu.part_process SCALE WORK_DIR PART ...

Out, JSON lines: {"row": …} for each row, {"loaded": seconds} before the first part, {"done": part}
after each; {"failed": why} is the last line of one that does not go on.
"""

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from benchmarks.gpu.plan import PARTS, Group, Part
from benchmarks.gpu.scale import SCALES, Scale


def run_parts(parts: Sequence[Part], work_dir: Path, scale: Scale, out: TextIO) -> int:
    """Run parts of one group in their order; return the exit code."""

    def say(**message: Any) -> None:  # Any: JSON
        print(json.dumps(message), file=out, flush=True)

    try:
        begin_s = time.perf_counter()
        with _opened(parts[0].group, work_dir, scale) as loaded:
            seconds = time.perf_counter() - begin_s
            if parts[0].group.describes:
                row = _function(parts[0].group.describes)(loaded, seconds)
                say(row=row | {"part": parts[0].name})
            say(loaded=seconds)
            for part in parts:
                for row in _function(part.measures)(loaded, scale):
                    say(row=row | {"part": part.name})
                say(done=part.name)
    except Exception as error:  # a border: whatever it is, the check says it and goes on
        say(failed=f"{type(error).__name__}: {error}")
        raise
    return 0


def _opened(
    group: Group, work_dir: Path, scale: Scale
) -> "contextlib.AbstractContextManager[Any]":  # Any: what a group loads
    if not group.opens:
        return contextlib.nullcontext(work_dir)
    opened: contextlib.AbstractContextManager[Any] = _function(group.opens)(work_dir, scale)
    return opened


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the named parts; whatever libraries print goes to standard error."""
    scale, work_dir, *names = arguments
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    parts = [part for part in PARTS if part.name in names]
    return run_parts(parts, Path(work_dir), SCALES[scale], out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
