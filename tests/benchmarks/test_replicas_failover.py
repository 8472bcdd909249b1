"""What the failover benchmark reads off a stream."""

import pytest

from benchmarks.replicas.failover import STEP_MS, pause_ms

STEP_S = STEP_MS / 1e3


def test_a_pause_ends_with_the_first_token_of_the_peer() -> None:
    """A token that the victim sent before its end may come a little after the kill."""
    before = [9.90, 9.92, 9.94, 9.96, 9.98]
    in_flight = 10.0 + STEP_S / 4
    assert pause_ms([*before, in_flight, 10.3, 10.32], 10.0) == pytest.approx(300)
    assert pause_ms([*before, 10.3, 10.32], 10.0) == pytest.approx(300)


def test_a_stream_that_never_goes_on_is_an_error_and_no_pause() -> None:
    """It must not vanish from the median."""
    with pytest.raises(ValueError, match="empty"):
        pause_ms([9.98, 10.0 + STEP_S / 4], 10.0)
