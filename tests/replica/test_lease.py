"""Leases: whatever the network does, a worker has ended before its replacement starts."""

import heapq
import itertools

from hypothesis import given
from hypothesis import strategies as st

from rillgate_server.core.clock import VirtualClock
from rillgate_server.replica.lease import MARGIN_S, LeaseGrant, WorkerLease

DURATION_S = 5.0


def test_a_lease_holds_for_its_duration_and_renewals_extend_it() -> None:
    """From the reading that a renewal names, not from its arrival."""
    clock = VirtualClock(100.0)
    lease = WorkerLease(DURATION_S, clock)
    assert lease.remaining_s() == 5.0
    clock.advance(2.0)
    assert lease.renew(101.0) == 102.0
    assert lease.remaining_s() == 4.0
    assert lease.renew(100.0) == 102.0  # an old one takes nothing away
    assert lease.remaining_s() == 4.0


def test_a_lease_that_is_over_stays_over() -> None:
    """A renewal that comes too late wakes nothing."""
    clock = VirtualClock()
    lease = WorkerLease(DURATION_S, clock)
    clock.advance(5.0)
    assert lease.remaining_s() == 0.0
    assert lease.renew(clock.now()) is None
    assert lease.remaining_s() == 0.0


def test_a_renewal_of_a_reading_that_was_never_given_adds_no_more_than_one_from_now() -> None:
    """A grantor that made it up cannot keep a worker for ever."""
    lease = WorkerLease(DURATION_S, VirtualClock(10.0))
    lease.renew(1e9)
    assert lease.remaining_s() == DURATION_S


def test_a_renewal_that_was_held_up_gives_nothing() -> None:
    """Sent before the cut, delivered after: it counts from its reading, which is long ago."""
    clock = VirtualClock()
    lease = WorkerLease(DURATION_S, clock)
    reading = lease.renew(0.0)
    assert reading == 0.0
    clock.advance(4.9)
    lease.renew(reading)
    clock.advance(0.1)
    assert lease.remaining_s() == 0.0


def test_a_worker_is_lost_when_no_answer_came_for_a_lease() -> None:
    """Renewals that are sent do not count, answers do."""
    clock = VirtualClock()
    grant = LeaseGrant(DURATION_S, clock, reading_s=77.0)
    clock.advance(3.0)
    assert grant.send() == 77.0
    assert grant.patience_s == 2.0
    grant.note_answer(80.0)
    assert (grant.send(), grant.patience_s) == (80.0, 5.0)
    clock.advance(6.0)
    assert grant.patience_s == 0.0


def test_a_replacement_waits_for_the_lease_that_the_last_renewal_may_have_given() -> None:
    """Unless the worker has said that it ended."""
    clock = VirtualClock()
    grant = LeaseGrant(DURATION_S, clock, reading_s=0.0)
    assert grant.fenced_at_s == DURATION_S + MARGIN_S
    clock.advance(3.0)
    grant.send()
    assert grant.fenced_at_s == 3.0 + DURATION_S + MARGIN_S
    grant.note_end()
    assert grant.fenced_at_s == 0.0


delays = st.lists(st.floats(0.0, 20.0) | st.none(), min_size=1, max_size=30)
"""Of each message in seconds; None: it is lost."""


@given(delays=delays, offset_s=st.floats(-1e6, 1e6), drift=st.floats(0.9999, 1.0001))
def test_the_worker_has_ended_before_its_replacement_starts(
    delays: list[float | None], offset_s: float, drift: float
) -> None:
    """For any delays and losses of renewals and answers, with clocks that differ and run apart.

    Messages are played in the order of their arrival; when the last one has arrived, the worker's
    lease ends before the grantor's fence, on the one true clock.
    """
    grantor_clock, worker_clock = VirtualClock(), VirtualClock(offset_s)
    lease = WorkerLease(DURATION_S, worker_clock)
    grant = LeaseGrant(DURATION_S, grantor_clock, worker_clock.now())
    order = itertools.count()
    arrivals = [(float(at), next(order), "tick", 0.0) for at in range(20)]
    waits = itertools.cycle(delays)
    over_s: float | None = None
    while arrivals:
        at_s, _, kind, reading_s = heapq.heappop(arrivals)
        passed_s = at_s - grantor_clock.now()
        remaining_s = lease.remaining_s()
        if over_s is None and remaining_s <= passed_s * drift:
            over_s = grantor_clock.now() + remaining_s / drift
        grantor_clock.advance(passed_s)
        worker_clock.advance(passed_s * drift)
        delay_s = next(waits)
        if kind == "tick" and grant.patience_s > 0.0:
            sent: tuple[str, float | None] = ("renewal", grant.send())
        elif kind == "renewal":
            sent = ("answer", lease.renew(reading_s))
        else:
            if kind == "answer" and grant.patience_s > 0.0:
                grant.note_answer(reading_s)
            continue
        if delay_s is not None and sent[1] is not None:
            heapq.heappush(arrivals, (at_s + delay_s, next(order), sent[0], sent[1]))
    if over_s is None:
        over_s = grantor_clock.now() + lease.remaining_s() / drift
    assert over_s < grant.fenced_at_s
