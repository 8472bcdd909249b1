"""Measured rates."""

import pytest

from rillgate_server.scheduler.rates import MeasuredRates


def test_steps_of_one_kind_give_their_rate() -> None:
    """The first sample counts whole, later ones move the average towards them."""
    rates = MeasuredRates()
    rates.step_done(1000, 0, 2.0)
    rates.step_done(0, 8, 0.05)
    assert (rates.prefill_tokens_per_s, rates.decode_step_s) == (500.0, 0.05)
    for _ in range(50):
        rates.step_done(0, 8, 0.1)
    assert rates.decode_step_s == pytest.approx(0.1, rel=1e-3)


def test_a_mixed_step_counts_for_prefill_without_its_decode_part() -> None:
    """Else prefill would look slower the more streams run."""
    rates = MeasuredRates()
    rates.step_done(0, 8, 0.5)
    rates.step_done(100, 8, 1.5)
    assert (rates.prefill_tokens_per_s, rates.decode_step_s) == (100.0, 0.5)
    rates.step_done(100, 8, 0.4)  # faster than a decode step alone: says nothing
    assert rates.prefill_tokens_per_s == 100.0
