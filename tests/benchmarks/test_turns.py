"""Decode rates, medians of the rounds' ratios, and what becomes of a contestant that fails."""

import pytest

from benchmarks.contestants.decode_rate import steady_decode_rate
from benchmarks.contestants.protocol import Message
from benchmarks.limits import MachineLimits
from benchmarks.turns import DECODE, END_TO_END, Place, Turns

OURS, THEIRS = Place("05b", "ours", 4), Place("05b", "theirs", 4)


def _turns() -> Turns:
    return Turns(measure=lambda: MachineLimits(1e9, 2e9, 4e9))


def _message(decode: float | None) -> Message:
    return {"seconds": 2.0, "num_output_tokens": 64, DECODE: decode}


def _fail() -> Message:
    raise RuntimeError("no memory")


def test_decode_rate_counts_only_while_all_streams_decode() -> None:
    """Tokens before the last stream's first and after the first stream's last are left out."""
    early, late = [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    assert steady_decode_rate([early, late]) == 4 / 2.0  # at 2 and 3 s, one each, from 1 to 3 s


def test_decode_rate_is_none_where_streams_never_decode_together() -> None:
    """One stream ends before another begins: there is nothing to measure."""
    assert steady_decode_rate([[0.0, 1.0], [2.0, 3.0]]) is None


def test_ratio_is_the_median_of_the_rounds_and_not_the_ratio_of_medians() -> None:
    """A round counts where both have answered with a rate; a slow round cancels out."""
    turns = _turns()
    for number, (ours, theirs) in enumerate([(20.0, 10.0), (3.0, 1.0), (40.0, 10.0), (9.0, None)]):
        turns.take(OURS, number, lambda it=ours: _message(it))  # type: ignore[misc]
        turns.take(THEIRS, number, lambda it=theirs: _message(it))  # type: ignore[misc]
    turns.take(OURS, 4, lambda: _message(1000.0))
    assert turns.ratio(OURS, THEIRS, DECODE) == 3.0
    assert turns.ratio(OURS, THEIRS, END_TO_END) == 1.0
    assert turns.ratio(OURS, Place("05b", "nobody", 4), DECODE) is None


def test_one_that_fails_is_named_and_the_others_go_on() -> None:
    """A failure is a row with its reason; the failed one is not asked again in that shape."""
    turns = _turns()
    turns.take(THEIRS, 0, _fail)
    turns.take(THEIRS, 1, lambda: pytest.fail("asked again"))
    turns.take(OURS, 0, lambda: _message(5.0))
    first, failed = turns.rows()
    assert first["contestant"] == "ours"
    assert first[END_TO_END] == 32.0
    assert first["limits_before_and_after"] == [[[1.0, 2.0, 4.0]] * 2]
    assert failed == {"contestant": "05b/theirs", "failed": "no memory", "samples": ["no memory"]}


def test_table_has_a_line_per_contestant_and_gaps_where_nothing_was_measured() -> None:
    """Cells are decode and, in brackets, end to end."""
    turns = _turns()
    turns.take(OURS, 0, lambda: _message(5.0))
    turns.take(THEIRS, 0, lambda: _message(None))
    assert turns.table("05b", (1, 4)).splitlines()[2:] == [
        "| ours |  | 5 (32) |",
        "| theirs |  | – (32) |",
    ]
