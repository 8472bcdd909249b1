"""Runs parts in processes of their own, holds them to their time, and keeps what they said.

Owns the processes: one that fails, hangs or dies costs its part alone, and leaves no child behind.
Does not know what rows mean.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import Part
from benchmarks.gpu.rows import BEGAN, DID_NOT_END, Row
from benchmarks.gpu.scale import Scale
from rillgate_server.core.clock import Clock, SystemClock

_LEAST_S = 5.0
"""With less than this no part is begun."""
_EXIT_S = 20.0
"""For what a process ends behind its last part."""
_WORDS_S = 2.0
"""For the last of its lines; children of its own may hold the pipe for longer."""
_LAST_LINES = 12
"""Of standard error, for one that dies without a word."""


@dataclass(slots=True)
class Findings:
    """What is known so far. State: rows, and by part why it has none or not all."""

    rows: list[Row] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Add a row; one that only says when something began gives way to what became of it."""
        if self.rows and self.rows[-1]["what"] == BEGAN:
            self.rows.pop()
        self.rows.append(row)

    def close_open_row(self, now_s: float) -> None:
        """Turn a row that only says when something began into one that says how long it took at
        least: its part was ended."""
        if self.rows and self.rows[-1]["what"] == BEGAN:
            row = self.rows[-1]
            row["what"] = DID_NOT_END
            row["seconds_at_least"] = round(now_s - row.pop("began_s"), 2)


class Budget:
    """The time that is left for everything."""

    def __init__(self, seconds: float, clock: Clock) -> None:
        """Start it."""
        self._clock = clock
        self._end_s = clock.now() + seconds

    @property
    def left_s(self) -> float:
        """Seconds, negative once it is spent."""
        return self._end_s - self._clock.now()


MakeCommand = Callable[[Sequence[Part]], list[str]]


def part_command(scale: Scale, work_dir: Path) -> MakeCommand:
    """Return what makes the command that runs parts."""
    start = [sys.executable, "-m", "benchmarks.gpu.part_process", scale.name, str(work_dir)]
    return lambda parts: [*start, *(part.name for part in parts)]


class Children:
    """Runs parts one after another.

    State: what was found, and the time that is left.
    """

    def __init__(
        self,
        make_command: MakeCommand,
        environment: Mapping[str, str],
        budget: Budget,
        findings: Findings,
        on_change: Callable[[], None],
    ) -> None:
        """`on_change` is called when a part has ended, however it did."""
        self._make_command = make_command
        self._environment = environment
        self._budget = budget
        self._findings = findings
        self._on_change = on_change

    def run(self, parts: Sequence[Part]) -> None:
        """Run the parts of one group, in as many processes as it takes."""
        left = list(parts)
        while left:
            if self._budget.left_s < _LEAST_S:
                for part in left:
                    self._findings.skipped[part.name] = "no time was left"
                break
            left = self._run_process(left)
        self._on_change()

    def _run_process(self, parts: list[Part]) -> list[Part]:
        """Run a process over parts until it ends; return those that another one may try."""
        with _Child(self._make_command(parts), self._environment) as child:
            why = self._load(child, parts[0])
            if why is not None:
                for part in parts:  # what cannot be loaded once cannot be loaded twice
                    self._findings.failed[part.name] = why
                return []
            for position, part in enumerate(parts):
                why = self._hear(child, part.timeout_s, part.name, "done")
                if why is not None:
                    self._findings.failed[part.name] = why
                    self._findings.close_open_row(child.clock.now())
                    return parts[position + 1 :]
                self._on_change()
            child.is_done = True
        return []

    def _load(self, child: "_Child", first: Part) -> str | None:
        return self._hear(child, first.group.start_timeout_s, first.group.name, "loaded")

    def _hear(self, child: "_Child", limit_s: float, what: str, until: str) -> str | None:
        """Take in rows until a message of the kind `until`; return why it did not come."""
        limit_s = min(limit_s, self._budget.left_s)
        print(f"  {what}: {'loading' if until == 'loaded' else 'measuring'}", flush=True)
        limit = Budget(limit_s, child.clock)
        while True:
            message = child.receive(limit.left_s)
            if message is None:
                return f"took longer than {limit_s:.0f} s"
            if "row" in message:
                self._findings.add(message["row"])
            elif "failed" in message:
                return str(message["failed"])
            elif until in message:
                return None


class _Child:
    """A process with its lines, at the head of a group of processes that ends with it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.clock = SystemClock()
        self.is_done = False
        """Whether it has nothing left but to end."""
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()  # Any: JSON
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(environment),
            start_new_session=True,
        )
        self._last: deque[str] = deque(maxlen=_LAST_LINES)
        self._threads = [
            threading.Thread(target=self._read_messages, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        """Give it a moment if it ends by itself, then end all of its processes."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_S if self.is_done else 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for thread in self._threads:
            thread.join(_WORDS_S)

    def receive(self, timeout_s: float) -> dict[str, Any] | None:  # Any: JSON
        """Return the next message; None where none comes in time."""
        try:
            message = self._messages.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None
        if message is None:
            code = self._process.wait()
            self._threads[1].join(_WORDS_S)
            return {"failed": f"its process ended with {code}: {''.join(self._last).strip()}"}
        return message

    def _read_messages(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._messages.put(json.loads(line))
        self._messages.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                sys.stderr.write(line)
                self._last.append(line)
