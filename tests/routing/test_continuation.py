"""The rules of failover for one stream."""

import pytest

from rillgate_server.core.request import RejectReason
from rillgate_server.routing.continuation import (
    FIRST_RETRY_S,
    LONGEST_RETRY_S,
    MAX_BREAKS,
    Attempts,
    GiveUp,
    GiveUpReason,
    TryNow,
    WaitUntil,
)

NOWHERE = GiveUp(GiveUpReason.NO_REPLICA)
REFUSED = GiveUp(GiveUpReason.REFUSED)


# -- breaks ---------------------------------------------------------------------------------------


def test_a_broken_stream_is_tried_elsewhere_at_once() -> None:
    """Also at the same replica, if that is back already."""
    assert Attempts(30).broke(100.0, 5) == TryNow()


def test_a_request_that_kills_its_replica_does_not_kill_them_all() -> None:
    """Three breaks in a row without a new token are enough."""
    attempts = Attempts(30)
    steps = [attempts.broke(100.0 + i, 7) for i in range(MAX_BREAKS)]
    assert steps == [TryNow(), TryNow(), GiveUp(GiveUpReason.BROKE_TOO_OFTEN)]


def test_a_stream_that_goes_on_may_break_for_ever() -> None:
    """Each new token starts the count anew."""
    attempts = Attempts(30)
    for num_tokens in range(50):
        assert attempts.broke(100.0, num_tokens) == TryNow()
        if num_tokens:
            assert attempts.broke(100.0, num_tokens) == TryNow()


def test_tokens_that_a_continuation_brought_are_no_progress() -> None:
    """It was not this replica that made them."""
    attempts = Attempts(30, num_tokens=9)
    steps = [attempts.broke(100.0, 9) for _ in range(MAX_BREAKS)]
    assert steps[-1] == GiveUp(GiveUpReason.BROKE_TOO_OFTEN)


# -- handed over on purpose -----------------------------------------------------------------------


def test_a_stream_that_is_handed_over_is_tried_elsewhere_at_once() -> None:
    """However often: it is nobody's fault, and no break."""
    attempts = Attempts(30)
    assert all(attempts.handed_over(100.0, 0) == TryNow() for _ in range(2 * MAX_BREAKS))
    assert attempts.broke(101.0, 0) == TryNow(), "the first one"


def test_a_stream_that_is_handed_over_may_wait_for_a_place() -> None:
    """From then on, though it has no token yet: it had a place, and loses none of its limit."""
    attempts = Attempts(30)
    attempts.handed_over(100.0, 0)
    assert attempts.found_none(100.5) == WaitUntil(130.0)
    attempts.handed_over(120.0, 0)
    assert attempts.found_none(121.0) == WaitUntil(150.0)
    assert attempts.found_none(150.0) == NOWHERE


def test_refusals_before_a_hand_over_are_forgotten() -> None:
    """Who was full then may have room now, and pauses begin with the shortest."""
    attempts = Attempts(30)
    attempts.broke(100.0, 5)
    for _ in range(3):
        attempts.refused("a", RejectReason.OVERLOADED)
        attempts.found_none(100.0)
    attempts.refused("a", RejectReason.OVERLOADED)
    assert attempts.handed_over(101.0, 5) == TryNow()
    assert attempts.refused("b", RejectReason.OVERLOADED) == TryNow(frozenset("b"))
    assert attempts.found_none(101.0) == WaitUntil(101.0 + FIRST_RETRY_S)


def test_a_hand_over_hides_no_progress_and_makes_none() -> None:
    """Tokens that came before it part the breaks around it; without any, those are in a row."""
    attempts = Attempts(30)
    attempts.broke(100.0, 5)
    attempts.handed_over(101.0, 50)
    steps = [attempts.broke(102.0 + i, 50) for i in range(MAX_BREAKS)]
    assert steps == [TryNow(), TryNow(), GiveUp(GiveUpReason.BROKE_TOO_OFTEN)]
    attempts = Attempts(30)
    attempts.broke(100.0, 5)
    attempts.handed_over(101.0, 5)
    steps = [attempts.broke(102.0 + i, 5) for i in range(MAX_BREAKS - 1)]
    assert steps == [TryNow(), GiveUp(GiveUpReason.BROKE_TOO_OFTEN)]


# -- nobody there ---------------------------------------------------------------------------------


def test_a_new_request_does_not_wait_for_a_replica() -> None:
    """Its caller has nothing yet, and can go elsewhere."""
    assert Attempts(30).found_none(100.0) == NOWHERE


def test_a_broken_stream_waits_for_another_replica_up_to_the_limit() -> None:
    """From the break on, however often it looks."""
    attempts = Attempts(30)
    attempts.broke(100.0, 0)
    assert attempts.found_none(100.5) == WaitUntil(130.0)
    assert attempts.found_none(129.9) == WaitUntil(130.0)
    assert attempts.found_none(130.0) == NOWHERE


def test_a_continuation_waits_from_its_first_look_on() -> None:
    """A gateway that has just started may know no replica yet."""
    attempts = Attempts(30, num_tokens=4)
    assert attempts.found_none(100.0) == WaitUntil(130.0)
    assert attempts.found_none(130.0) == NOWHERE


def test_each_break_may_wait_as_long() -> None:
    """A replica that came back and broke again after a minute is a new trouble."""
    attempts = Attempts(30)
    attempts.broke(100.0, 3)
    attempts.started()
    attempts.broke(160.0, 3)
    assert attempts.found_none(161.0) == WaitUntil(190.0)


def test_a_stream_that_moves_without_a_break_may_wait_as_long() -> None:
    """What an earlier wait took is not held against it once a replica has begun with it."""
    attempts = Attempts(30, num_tokens=4)
    assert attempts.found_none(100.0) == WaitUntil(130.0)
    attempts.started()
    assert attempts.found_none(500.0) == WaitUntil(530.0)


def test_no_wait_at_all_is_a_setting() -> None:
    """With a limit of 0 a broken stream ends unless somebody is there."""
    attempts = Attempts(0)
    assert attempts.broke(100.0, 3) == TryNow()
    assert attempts.found_none(100.0) == NOWHERE


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reason", [RejectReason.INVALID, RejectReason.TOO_LONG, RejectReason.DEADLINE_NEVER]
)
def test_what_all_would_refuse_is_tried_nowhere_else(reason: RejectReason) -> None:
    """Whether it has started or not."""
    assert Attempts(30).refused("a", reason) == REFUSED
    assert Attempts(30, num_tokens=3).refused("a", reason) == REFUSED


@pytest.mark.parametrize("reason", [RejectReason.OVERLOADED, RejectReason.DEADLINE_NOW])
def test_a_new_request_tries_one_other_replica(reason: RejectReason) -> None:
    """Once; two full ones say enough of the rest."""
    attempts = Attempts(30)
    assert attempts.refused("a", reason) == TryNow(frozenset("a"))
    assert attempts.refused("b", reason) == REFUSED


def test_a_new_request_without_another_replica_is_refused() -> None:
    """With the refusal that it got: there is a replica."""
    attempts = Attempts(30)
    attempts.refused("a", RejectReason.OVERLOADED)
    assert attempts.found_none(100.0) == REFUSED


def test_draining_replicas_are_passed_over_however_many() -> None:
    """They say nothing of the others' load."""
    attempts = Attempts(30)
    attempts.refused("a", RejectReason.DRAINING)
    assert attempts.refused("b", RejectReason.DRAINING) == TryNow(frozenset("ab"))
    assert attempts.refused("c", RejectReason.OVERLOADED) == TryNow(frozenset("abc"))
    assert attempts.refused("d", RejectReason.OVERLOADED) == REFUSED


def test_a_started_stream_goes_on_trying_with_growing_waits() -> None:
    """All that are there first, then after pauses, until the limit is over."""
    attempts = Attempts(30)
    attempts.broke(100.0, 5)
    now, waits = 100.0, []
    while True:
        assert attempts.refused("a", RejectReason.OVERLOADED) == TryNow(frozenset("a"))
        assert attempts.refused("b", RejectReason.OVERLOADED) == TryNow(frozenset("ab"))
        step = attempts.found_none(now)
        if not isinstance(step, WaitUntil):
            break
        waits.append(step.until_s - now)
        now = step.until_s
    assert step == REFUSED
    assert now == 130.0
    assert waits[:5] == pytest.approx([FIRST_RETRY_S * 2**i for i in range(5)])
    assert max(waits) == pytest.approx(LONGEST_RETRY_S)


def test_after_a_wait_nobody_is_excluded() -> None:
    """Who was full may have room now; and who is gone by then is no refusal."""
    attempts = Attempts(30)
    attempts.broke(100.0, 5)
    attempts.refused("a", RejectReason.OVERLOADED)
    assert isinstance(attempts.found_none(100.0), WaitUntil)
    assert attempts.refused("b", RejectReason.OVERLOADED) == TryNow(frozenset("b"))
    attempts.found_none(100.2)
    assert attempts.found_none(100.3) == WaitUntil(130.0)
