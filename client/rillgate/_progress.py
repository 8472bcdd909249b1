"""A progress bar on a terminal's last line, for `batch` and `rillgate bench`.

Owns that one line of stderr. Knows nothing of what is counted. Not rich: the base install has none.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_WIDTH = 30


class Progress:
    """Owns the count; draws only where `visible`."""

    def __init__(self, total: int, label: str, visible: bool) -> None:
        """Draw the empty bar."""
        self._total = total
        self._label = label
        self._visible = visible
        self._num_done = 0
        self._drawn_permille = -1
        self._draw()

    def __repr__(self) -> str:
        """Show the count."""
        return f"Progress({self._num_done} of {self._total})"

    def advance(self, num: int = 1) -> None:
        """Count what was done; not for several threads at once."""
        self._num_done += num
        self._draw()

    def _draw(self) -> None:
        permille = 1000 * self._num_done // max(1, self._total)
        if not self._visible or permille == self._drawn_permille:
            return
        self._drawn_permille = permille
        num_full = min(_WIDTH, _WIDTH * self._num_done // max(1, self._total))
        bar = "█" * num_full + "░" * (_WIDTH - num_full)
        sys.stderr.write(f"\r{self._label} {bar} {self._num_done}/{self._total}\x1b[K")
        sys.stderr.flush()

    def clear(self) -> None:
        """Take the bar away."""
        if self._visible:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


@contextmanager
def progress_bar(total: int, label: str, visible: bool | None = None) -> Iterator[Progress]:
    """Show a bar while the block runs; `visible` None: where stderr is a terminal."""
    progress = Progress(total, label, sys.stderr.isatty() if visible is None else visible)
    try:
        yield progress
    finally:
        progress.clear()
