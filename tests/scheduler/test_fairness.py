"""Virtual token counters: who is next, what coming back is worth, and what is forgotten."""

import random

import pytest

from rillgate_server.scheduler.fairness import (
    MAX_IDLE_ACCOUNTS,
    W_INPUT,
    W_KV_SECOND,
    W_OUTPUT,
    VirtualCounters,
    service_bound,
)


def test_the_tenant_that_has_had_least_is_next_and_ties_go_to_who_is_queued_longest() -> None:
    """A charge counts by its amount over the weight, whoever it is for."""
    counters = VirtualCounters()
    for tenant in ("a", "b", "c"):
        counters.enter(tenant)
    assert counters.first() == "a"
    counters.charge("a", 1.0, 10.0)
    counters.charge("b", 4.0, 10.0)
    assert counters.first() == "c"
    counters.charge("c", 1.0, 3.0)
    assert counters.first() == "b"
    assert [counters.counter(tenant) for tenant in "abc"] == [10.0, 2.5, 3.0]
    counters.check_integrity()


def test_idleness_earns_no_credit() -> None:
    """Who comes back starts level with the least of those who are queued."""
    counters = VirtualCounters()
    for tenant in ("busy", "busier"):
        counters.enter(tenant)
    counters.charge("busy", 1.0, 100.0)
    counters.charge("busier", 1.0, 300.0)
    counters.enter("idle")
    assert counters.counter("idle") == 100.0


def test_a_debt_outlives_an_empty_queue() -> None:
    """Who sends one request at a time is charged like who sends them all at once."""
    counters = VirtualCounters()
    for tenant in ("patient", "eager"):
        counters.enter(tenant)
    counters.charge("eager", 1.0, 50.0)
    counters.leave("eager")
    counters.charge("eager", 1.0, 20.0)  # it still runs
    counters.enter("eager")
    assert counters.counter("eager") == 70.0
    assert counters.first() == "patient"


def test_after_an_empty_queue_one_starts_level_with_who_left_last() -> None:
    """Both what that one had had, and what it has still been charged since."""
    counters = VirtualCounters()
    counters.enter("last")
    counters.leave("last")
    counters.charge("last", 1.0, 40.0)
    counters.enter("new")
    assert counters.counter("new") == 40.0


def test_a_hundred_thousand_tenants_leave_no_accounts_behind_and_no_debt_is_forgiven() -> None:
    """Nobody comes back with less than it had when its account was forgotten."""
    counters = VirtualCounters()
    counters.enter("always")  # queued and never served: the least counter does not rise
    for number in range(100_000):
        tenant = f"tenant-{number}"
        counters.enter(tenant)
        counters.leave(tenant)
        counters.charge(tenant, 1.0, 7.0)
        assert len(counters) <= MAX_IDLE_ACCOUNTS + 2
    counters.check_integrity()
    assert counters.counter("always") == 0.0
    counters.enter("tenant-0")
    assert counters.counter("tenant-0") >= 7.0
    assert counters.first() == "always"


def test_accounts_that_would_be_lifted_anyway_are_forgotten() -> None:
    """They cost nothing as soon as all who are queued have had as much."""
    counters = VirtualCounters()
    counters.enter("gone")
    counters.charge("gone", 1.0, 5.0)
    counters.enter("stays")
    counters.leave("gone")
    counters.charge("stays", 1.0, 6.0)
    assert counters.first() == "stays"
    assert len(counters) == 1
    counters.enter("gone")
    assert counters.counter("gone") == counters.counter("stays")


def test_the_order_agrees_with_a_plain_search_for_the_least() -> None:
    """10,000 random comings, goings and charges, against a dictionary that forgets nothing."""
    draw = random.Random(7)
    counters = VirtualCounters()
    queued: list[str] = []
    for _ in range(10_000):
        tenant = f"t{draw.randrange(40)}"
        what = draw.random()
        if what < 0.6:
            counters.charge(tenant, draw.choice((0.5, 1.0, 2.0)), draw.randrange(20))
        elif tenant in queued:
            queued.remove(tenant)
            counters.leave(tenant)
        else:
            counters.enter(tenant)
            queued.append(tenant)
        if queued:
            assert counters.first() == min(queued, key=counters.counter)
        counters.check_integrity()


def test_the_bound_is_the_papers_formula_and_a_term_for_what_is_held() -> None:
    """With nothing held for any time it is 2 max(w_p L, w_q M); the lesser weight widens it."""
    assert service_bound(100, 1000, 0.0) == 2 * W_OUTPUT * 1000
    assert service_bound(5000, 1000, 0.0) == 2 * W_INPUT * 5000
    held = 2 * W_KV_SECOND * 1000 * 30
    assert service_bound(100, 1000, 30.0) == pytest.approx(2 * W_OUTPUT * 1000 + held)
    assert service_bound(100, 1000, 0.0, weight=0.5) == 2 * service_bound(100, 1000, 0.0)
