"""How loading is shown."""

import io

import pytest

from rillgate_server.replica.child import SUPERVISED
from rillgate_server.replica.progress import loading_progress, shown_progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


def test_a_terminal_gets_a_bar_that_disappears() -> None:
    """Something is drawn while it loads; the end clears the line."""
    terminal = Terminal()
    with shown_progress(terminal) as show:
        show(1 << 20, 4 << 20)
        assert "loading weights" in terminal.getvalue()
        show(4 << 20, 4 << 20)
    assert terminal.getvalue().endswith("\x1b[2K")


def test_a_second_load_draws_its_bar_anew() -> None:
    """A restarted replica loads again, under the same supervisor."""
    terminal = Terminal()
    with shown_progress(terminal) as show:
        show(4, 4)
        length = len(terminal.getvalue())
        show(1, 4)
        assert "loading weights" in terminal.getvalue()[length:]


def test_a_log_is_not_filled_by_a_short_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is loaded at once needs no line; nothing goes to stdout."""
    monkeypatch.delenv(SUPERVISED, raising=False)
    stdout, stderr = io.StringIO(), io.StringIO()
    with loading_progress(stdout, stderr) as show:
        show(1, 4)
        show(4, 4)
    assert (stdout.getvalue(), stderr.getvalue()) == ("", "")
