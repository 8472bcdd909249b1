"""The numbers of a row, computed from samples whose times are known exactly."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rillgate.bench.measure import Sample
from rillgate.bench.report import HEADERS, cells, to_json
from rillgate.bench.summary import percentile, summarize


def _sample(sent_s: float, first_s: float | None, last_s: float | None, tokens: int) -> Sample:
    return Sample(
        sent_s=sent_s,
        first_token_s=first_s,
        last_token_s=last_s,
        num_output_tokens=tokens,
        num_prompt_tokens=128,
        num_cached_tokens=16,
        num_preemptions=1,
        max_gap_s=0.0,
        error="" if first_s is not None else "UNAVAILABLE: gone",
    )


def test_a_row_holds_rate_latencies_and_counts() -> None:
    """Throughput is all tokens over the span from the first send to the last token."""
    row = summarize("2", [_sample(1.0, 1.5, 3.5, 11), _sample(1.5, 1.6, 6.0, 45)])
    assert (row.output_tokens, row.duration_s) == (56, 5.0)
    assert row.output_tokens_per_s == pytest.approx(56 / 5)
    assert row.ttft_ms.median == pytest.approx(300)
    assert row.tpot_ms.median == pytest.approx((200 + 100) / 2)
    assert row.tpot_ms.p99 == pytest.approx(199)
    assert (row.prompt_tokens, row.cached_tokens, row.preemptions) == (256, 32, 2)
    assert (row.num_requests, row.num_failed) == (2, 0)


def test_a_failed_request_counts_and_is_in_no_latency() -> None:
    """The first error is kept; latencies speak of requests that ended well."""
    row = summarize("2", [_sample(0.0, 0.1, 1.0, 10), _sample(0.0, None, None, 0)])
    assert (row.num_failed, row.first_error) == (1, "UNAVAILABLE: gone")
    assert row.ttft_ms.p99 == pytest.approx(100)


def test_what_was_not_measured_is_a_dash_and_null() -> None:
    """No token: no number in the table, null in JSON, which stays valid."""
    samples = [_sample(0.0, None, None, 0)]
    row = summarize("1", samples)
    assert math.isnan(row.ttft_ms.median)
    assert len(cells(row)) == len(HEADERS)
    assert cells(row)[3:10] == ("-",) * 7
    report = to_json({"target": "t"}, [(row, samples)])
    text = json.dumps(report, allow_nan=False)
    assert json.loads(text)["rows"][0]["ttft_ms"]["median"] is None
    assert json.loads(text)["rows"][0]["samples"][0]["error"] == "UNAVAILABLE: gone"


def test_one_token_has_no_time_per_output_token() -> None:
    """The first token's time is the time to first token, nothing else."""
    assert math.isnan(summarize("1", [_sample(0.0, 0.5, 0.5, 1)]).tpot_ms.median)


@given(
    values=st.lists(st.floats(0, 1e6), min_size=1, max_size=50),
    fraction=st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]),
)
def test_percentiles_are_numpys(values: list[float], fraction: float) -> None:
    """The same definition that everybody's tools use."""
    expected = float(np.quantile(values, fraction))
    assert percentile(values, fraction) == pytest.approx(expected, rel=1e-9, abs=1e-9)
