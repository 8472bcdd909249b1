"""The progress bar of `batch` and `rillgate bench`."""

import pytest

from rillgate._progress import progress_bar


def test_a_visible_bar_counts_and_goes_away(capsys: pytest.CaptureFixture[str]) -> None:
    """It stands on one line of stderr and leaves an empty one, also after an error."""
    with progress_bar(4, "prompts", visible=True) as bar:
        bar.advance(3)
    drawn = capsys.readouterr()
    assert drawn.out == ""
    assert "prompts" in drawn.err
    assert "3/4" in drawn.err
    assert "\n" not in drawn.err
    assert drawn.err.endswith("\r\x1b[K")


def test_a_bar_of_nothing_is_drawn_without_dividing_by_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An empty batch has a bar too."""
    with progress_bar(0, "prompts", visible=True):
        pass
    assert "0/0" in capsys.readouterr().err


def test_no_bar_is_drawn_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    """Not into a log file, and not where it was switched off."""
    for visible in (None, False):
        with progress_bar(4, "prompts", visible) as bar:
            bar.advance()
    assert capsys.readouterr().err == ""
