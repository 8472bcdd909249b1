"""Shows how far the weights are: a bar on a terminal, a few plain lines elsewhere."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

_LINE_EVERY_FRACTION = 0.25


@contextlib.contextmanager
def loading_progress(stream: TextIO) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback for (bytes done, bytes in all)."""
    if not stream.isatty():
        yield _plain(stream)
        return
    columns = (
        TextColumn("loading weights"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        task = progress.add_task("")
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _plain(stream: TextIO) -> Callable[[int, int], None]:
    next_fraction = _LINE_EVERY_FRACTION

    def on_progress(done: int, total: int) -> None:
        nonlocal next_fraction
        if total and done / total >= next_fraction:
            while done / total >= next_fraction:
                next_fraction += _LINE_EVERY_FRACTION
            print(
                f"loading weights: {done / total:.0%} of {total / 2**20:.1f} MiB",
                file=stream,
                flush=True,
            )

    return on_progress
