"""`make gpu-check`: are the answers right on this GPU, and how near to its limits does it come?

    python -m benchmarks.gpu.check [--only PART ...] [--budget-s S] [--work-dir DIR] [--keep]

First the checks of tests/gpu, then each part in turn (benchmarks.gpu.plan), in processes of their
own and with limits of their own, then the Triton kernels' own tests, then the table. What is known
is written after each part, into results/gpu.json and results/gpu_check.txt. What does not fit into
the budget is listed as skipped.
Without a GPU nothing is measured, and nothing is written. `--tiny --device cpu` runs all parts in
tiny shapes on a CPU: for tests.
"""

import argparse
import json
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.gpu.children import Budget, Children, Findings, part_command
from benchmarks.gpu.correctness import COMMAND, KERNELS_COMMAND, run_checks
from benchmarks.gpu.plan import NAMES, runs_of_a_group, with_needs
from benchmarks.gpu.ratios import ratios
from benchmarks.gpu.rows import find
from benchmarks.gpu.scale import FULL, TINY
from benchmarks.gpu.table import table
from benchmarks.results_file import RESULTS, ROOT, git_commit, write_results
from rillgate_server.core.clock import SystemClock

_CHECKS = "checks"
_KERNELS = "kernels"
_CHECKS_TIMEOUT_S = 200.0
_LEAST_CHECKS_S = 20.0
_BUDGET_S = 450.0
_PACKAGES = ("torch", "triton", "transformers", "grpcio", "protobuf")


class Report:
    """What is written: the rows with their ratios, and the table. State: the checks' table."""

    def __init__(self, arguments: argparse.Namespace, findings: Findings) -> None:
        """Write into the arguments' folder."""
        self._directory: Path = arguments.results_dir
        self._findings = findings
        self._command = " ".join(["python -m benchmarks.gpu.check", *sys.argv[1:]])
        self.checks = ""

    def write(self) -> None:
        """Write both files, with what is known so far.

        A fault here must not cost the parts that are still to come: it is printed, with the rows.
        """
        try:
            self._write()
        except Exception:
            traceback.print_exc()
            print(json.dumps(self._findings.rows), flush=True)

    def _write(self) -> None:
        if self._findings.rows:
            rows = self._findings.rows
            write_results("gpu", self._command, rows, ratios(rows), _PACKAGES, self._directory)
            (self._directory / "gpu_check.txt").write_text(self.text() + "\n", encoding="utf-8")

    def text(self) -> str:
        """Return all that a reader wants to know."""
        head = [
            f"date      {datetime.now(UTC).date()}",
            f"hardware  {self._device()}, {os.cpu_count()} cores",
            f"software  Python {sys.version.split()[0]}, torch {torch.__version__}",
            f"commit    {git_commit()}",
            f"command   {self._command}",
        ]
        return "\n".join([*head, "", *([self.checks, ""] if self.checks else []), self.table()])

    def _device(self) -> str:
        """Return what the limits were measured on; this process itself takes no device's memory."""
        limits = find(self._findings.rows, "limits")
        return str(limits["device"]) if limits is not None else "a device that is not known yet"

    def table(self) -> str:
        """Return the table of what was measured."""
        return table(self._findings)


def main(given: Sequence[str] | None = None) -> int:
    """Check, measure, say; return 1 where something failed."""
    arguments = _parser().parse_args(given)
    findings, environment = Findings(), dict(os.environ)
    budget = Budget(arguments.budget_s, SystemClock())
    report = Report(arguments, findings)
    if arguments.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    chosen = arguments.only or ((*NAMES,) if arguments.tiny else (_CHECKS, *NAMES, _KERNELS))
    names = [name for name in chosen if name in NAMES]
    if _CHECKS in chosen:
        report.checks = _check(_CHECKS, COMMAND, findings, budget, environment)
    parts = with_needs(names)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        left = [part.name for part in parts] + [_KERNELS] * (_KERNELS in chosen)
        findings.skipped |= dict.fromkeys(left, "no CUDA device")
        findings.rows.clear()
    else:
        report.write()
        scale = TINY if arguments.tiny else FULL
        command = part_command(scale, arguments.work_dir)
        children = Children(command, environment, budget, findings, report.write)
        try:
            for run in runs_of_a_group(parts):
                children.run(run)
        finally:
            if not arguments.keep:
                for shape in (scale.large, scale.small):
                    shutil.rmtree(arguments.work_dir / shape.name, ignore_errors=True)
        if _KERNELS in chosen:
            _check(_KERNELS, KERNELS_COMMAND, findings, budget, environment)
            report.write()
    print(f"\n{report.table()}", flush=True)
    return 1 if findings.failed else 0


def _check(
    name: str,
    command: Sequence[str],
    findings: Findings,
    budget: Budget,
    environment: dict[str, str],
) -> str:
    """Run checks, note what came of them, and return their table."""
    limit_s = min(_CHECKS_TIMEOUT_S, budget.left_s)
    if limit_s < _LEAST_CHECKS_S:
        findings.skipped[name] = f"{budget.left_s:.0f} s of the budget were left"
        return ""
    try:
        said, row = run_checks(environment, limit_s, command)
    except (TimeoutError, RuntimeError) as error:
        findings.failed[name] = str(error)
        return ""
    findings.rows.append(row | {"part": name, "what": name})
    num_failed = row.get("failed", 0) + row.get("error", 0)
    if num_failed:
        findings.failed[name] = f"{num_failed} of its tests"
    return said


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = (_CHECKS, *NAMES, _KERNELS)
    parser.add_argument("--only", nargs="+", choices=choices, help="these, and what they need")
    parser.add_argument("--budget-s", type=float, default=_BUDGET_S, help="for everything (450)")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--results-dir", type=Path, default=RESULTS)
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints (15 GB)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for tests")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser


if __name__ == "__main__":
    sys.exit(main())
