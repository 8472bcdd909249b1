"""Plans and reports as bytes: what comes out is what went in, and nothing else comes out."""

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import CopyDone, CopyJob, RowPlan, SlotStart, StepPlan, StepResult
from rillgate_server.core.step_codec import (
    RankReport,
    decode_plan,
    decode_report,
    encode_plan,
    encode_report,
    sampled_tokens,
)
from rillgate_server.errors import EngineFailure

PLANS = st.from_type(StepPlan)
SAMPLED = st.lists(st.tuples(st.integers(0, 4096), st.integers(0, 1 << 20)), max_size=4).map(tuple)


@given(PLANS, SAMPLED)
def test_a_plan_survives_its_bytes(plan: StepPlan, sampled: tuple[tuple[int, int], ...]) -> None:
    """Every field, of whatever value, with its type: tuples stay tuples, enums enums.

    As text, since a NaN does not equal itself.
    """
    assert repr(decode_plan(encode_plan(plan, sampled))) == repr((plan, sampled))


@given(st.from_type(RankReport))
def test_a_report_survives_its_bytes(report: RankReport) -> None:
    """The same for what comes back."""
    assert repr(decode_report(encode_report(report))) == repr(report)


@pytest.mark.parametrize(
    ("value", "num_fields"),
    [
        (StepPlan, 5),
        (SlotStart, 6),
        (SamplingParams, 13),
        (RowPlan, 8),
        (CopyJob, 4),
        (CopyDone, 7),
    ],
)
def test_every_field_is_encoded(value: type, num_fields: int) -> None:
    """A field that is added must be added to the codec: its default would hide that it is lost."""
    assert len(fields(value)) == num_fields


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"[1,2,3,4,5,6]", b"\x80\x04.", b"[[],[]"])
def test_other_bytes_are_refused(data: bytes) -> None:
    """Whatever a stranger sends ends in our own error."""
    with pytest.raises(EngineFailure, match="are no plan"):
        decode_plan(data)
    with pytest.raises(EngineFailure, match="are no report"):
        decode_report(data)


def test_a_row_that_failed_gives_no_token_to_note() -> None:
    """The other ranks' slots stay equal to rank 0's, which noted nothing either."""
    rows = (RowPlan(3, 0, 1), RowPlan(4, 0, 2, samples=False), RowPlan(5, 0, 1))
    result = StepResult(7, ((), (11,)))
    assert sampled_tokens(StepPlan(7, (), rows), result) == ((5, 11),)


def test_all_tokens_of_a_row_with_drafts_are_noted() -> None:
    """The accepted drafts and the token behind them, in order."""
    rows = (RowPlan(3, 0, 4, draft_token_ids=(7, 8, 9)), RowPlan(4, 0, 1))
    result = StepResult(7, ((7, 8, 1), (2,)))
    expected = ((3, 7), (3, 8), (3, 1), (4, 2))
    assert sampled_tokens(StepPlan(7, (), rows), result) == expected
