"""Shows how far the weights are: a bar on a terminal, a few plain lines elsewhere.

Under a supervisor the replica only says PROGRESS, and the supervisor, which has the terminal, shows
it.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from rillgate_server.replica.child import PROGRESS, SUPERVISED

ProgressCallback = Callable[[int, int], None]
"""Takes (bytes done, bytes in all)."""

_EVERY_S = 0.1  # a bar that moves
_LINE_EVERY_S = 5.0  # lines in a log


@contextlib.contextmanager
def loading_progress(stdout: TextIO, stderr: TextIO) -> Iterator[ProgressCallback]:
    """Yield what a replica calls while it loads."""
    if os.environ.get(SUPERVISED):
        yield _at_most_every(_EVERY_S, lambda done, total: _say(stdout, done, total))
    else:
        with shown_progress(stderr) as show:
            yield show


@contextlib.contextmanager
def shown_progress(stream: TextIO) -> Iterator[ProgressCallback]:
    """Yield what shows progress to people; the bar disappears when all is done."""
    if not stream.isatty():
        yield _at_most_every(_LINE_EVERY_S, lambda done, total: _write_line(stream, done, total))
        return
    progress = Progress(
        TextColumn("loading weights"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=Console(file=stream),
        transient=True,
    )
    task = progress.add_task("")

    def show(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)
        progress.start()
        if done >= total:
            progress.stop()

    try:
        yield show
    finally:
        progress.stop()


def _at_most_every(seconds: float, show: ProgressCallback) -> ProgressCallback:
    """Leave out what comes too soon after the last, but never the end of what was begun."""
    last_s = time.monotonic()
    has_shown = False

    def on_progress(done: int, total: int) -> None:
        nonlocal last_s, has_shown
        now_s = time.monotonic()
        if now_s - last_s >= seconds or (has_shown and done >= total):
            last_s, has_shown = now_s, True
            show(done, total)

    return on_progress


def _say(stream: TextIO, done: int, total: int) -> None:
    print(PROGRESS, done, total, file=stream, flush=True)


def _write_line(stream: TextIO, done: int, total: int) -> None:
    fraction = done / total if total else 1.0
    print(f"loading weights: {fraction:.0%} of {total / 2**20:,.1f} MiB", file=stream, flush=True)
