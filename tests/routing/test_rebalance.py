"""Which waiting requests move."""

from collections.abc import Mapping
from dataclasses import replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from rillgate_server.routing.rebalance import MIN_STAY_S, Move, WaitingRequest, plan_moves
from tests.support.routing import IDLE, WELCOME, Cluster, prompt

FULL = replace(IDLE, num_running=8, num_waiting=6)


def waits(*keys: str, placed_s: float = 90.0, num_choices: int = 1) -> list[WaitingRequest]:
    """Make requests that wait, oldest first."""
    return [WaitingRequest(key, num_choices, placed_s) for key in keys]


def moves(cluster: Cluster, waiting: Mapping[str, list[WaitingRequest]]) -> list[Move]:
    """Plan."""
    return plan_moves(cluster.router.views, waiting, cluster.now)


def test_the_oldest_move_to_free_seats() -> None:
    """No more than there are seats, and to the least loaded first."""
    cluster = Cluster("least-load", 3)
    cluster.load("a", FULL)
    cluster.load("b", replace(IDLE, num_running=6))
    cluster.load("c", replace(IDLE, num_running=7))
    planned = moves(cluster, {"a": waits("1", "2", "3", "4", "5")})
    assert planned == [Move("1", "a", "b"), Move("2", "a", "b"), Move("3", "a", "c")]


def test_nothing_moves_to_where_something_waits() -> None:
    """Its own are first, this gateway's and everybody's."""
    cluster = Cluster("least-load", 3)
    cluster.load("a", FULL)
    cluster.load("b", replace(IDLE, num_running=1, num_waiting=1))
    assert moves(cluster, {"a": waits("1"), "c": waits("2")}) == []


def test_nothing_moves_to_where_nothing_may_go() -> None:
    """Not to one that drains, is lost, or has said nothing of its load."""
    cluster = Cluster("least-load", 1)
    cluster.load("a", FULL)
    cluster.add("b").told_to_drain()
    cluster.router.add("c").connected(WELCOME, cluster.now)
    assert moves(cluster, {"a": waits("1")}) == []
    cluster.load("c")
    assert moves(cluster, {"a": waits("1")}) == [Move("1", "a", "c")]
    cluster.now += 2
    assert moves(cluster, {"a": waits("1")}) == []


def test_a_request_stays_for_a_moment_where_it_came() -> None:
    """So it cannot go back and forth faster than loads are known."""
    cluster = Cluster("least-load", 2)
    cluster.load("a", FULL)
    late = cluster.now - 0.9 * MIN_STAY_S
    assert moves(cluster, {"a": waits("1", placed_s=late)}) == []
    assert moves(cluster, {"a": waits("1") + waits("2", placed_s=late)}) == [Move("1", "a", "b")]


def test_what_was_sent_since_the_last_load_takes_seats() -> None:
    """A burst of new requests is not followed by moved ones."""
    cluster = Cluster("round-robin", 2)
    cluster.load("a", FULL)
    for _ in range(14):
        cluster.send(prompt(8))
    assert len(moves(cluster, {"a": waits("1", "2", "3")})) == 1


def test_a_request_moves_whole() -> None:
    """All its choices need a seat."""
    cluster = Cluster("least-load", 2)
    cluster.load("a", FULL)
    cluster.load("b", replace(IDLE, num_running=5))
    assert moves(cluster, {"a": waits("1", num_choices=4)}) == []
    assert moves(cluster, {"a": waits("1", num_choices=3)}) == [Move("1", "a", "b")]


def test_nothing_moves_to_one_that_would_be_the_more_loaded() -> None:
    """A replica whose requests wait for blocks, not seats, may have seats free."""
    cluster = Cluster("least-load", 2)
    cluster.load("a", replace(IDLE, num_running=2, num_waiting=1))
    cluster.load("b", replace(IDLE, num_running=2))
    assert moves(cluster, {"a": waits("1")}) == []
    cluster.load("b", replace(IDLE, num_running=0))
    assert moves(cluster, {"a": waits("1")}) == [Move("1", "a", "b")]


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3), st.floats(0, 3)), max_size=20),
)
def test_a_second_look_moves_nothing_back(
    loads: list[tuple[int, int]], requests: list[tuple[int, int, float]]
) -> None:
    """After any plan is carried out, a plan for the same moment has no moves of the moved, and
    nobody has more than its seats because of it.
    """
    cluster = Cluster("least-load", len(loads))
    before = {}
    for key, (num_running, num_waiting) in zip("abcde", loads, strict=False):
        cluster.load(key, replace(IDLE, num_running=num_running, num_waiting=num_waiting))
        before[key] = num_running + num_waiting
    waiting: dict[str, list[WaitingRequest]] = {key: [] for key in before}
    for number, (place, num_choices, age_s) in enumerate(
        sorted(requests, key=lambda it: it[2], reverse=True)
    ):
        key = "abcde"[place % len(loads)]
        waiting[key].append(WaitingRequest(str(number), num_choices, cluster.now - age_s))
    planned = moves(cluster, waiting)
    after = dict(before)
    by_key = {it.request_key: it for placed in waiting.values() for it in placed}
    for move in planned:
        request = by_key[move.request_key]
        assert before[move.to_key] < before[move.from_key]
        after[move.to_key] += request.num_choices
        after[move.from_key] -= request.num_choices
        waiting[move.from_key].remove(request)
        waiting[move.to_key].append(replace(request, placed_s=cluster.now))
    for move in planned:
        assert after[move.to_key] <= WELCOME.max_running
        assert after[move.to_key] < before[move.from_key]
    for key, number in after.items():
        cluster.load(key, replace(IDLE, num_running=max(0, number)))
    moved = {move.request_key for move in planned}
    assert not moved & {move.request_key for move in moves(cluster, waiting)}


@given(
    st.lists(st.integers(0, 8), min_size=2, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), max_size=20),
    st.randoms(use_true_random=False),
)
def test_moves_come_to_an_end_where_nothing_else_changes(
    running: list[int], requests: list[tuple[int, int]], draw: Random
) -> None:
    """Though all may move again, and what moved may have to wait there, too: each plan makes the
    loads more equal, so nothing goes back and forth.
    """
    keys = "abcde"[: len(running)]
    cluster = Cluster("least-load", len(running))
    num_running = dict(zip(keys, running, strict=True))
    waiting: dict[str, list[WaitingRequest]] = {key: [] for key in keys}
    for number, (place, num_choices) in enumerate(requests):
        key = keys[place % len(keys)]
        waiting[key].append(WaitingRequest(str(number), num_choices, cluster.now))

    def look() -> list[Move]:
        for key, placed in waiting.items():
            num_waiting = sum(it.num_choices for it in placed)
            load = replace(IDLE, num_running=num_running[key], num_waiting=num_waiting)
            cluster.load(key, load)
        return moves(cluster, waiting)

    def unevenness() -> int:
        views = cluster.router.views
        return sum(view.num_choices**2 for view in views)

    cluster.now += MIN_STAY_S
    while planned := look():
        before = unevenness()
        for move in planned:
            (request,) = (it for it in waiting[move.from_key] if it.request_key == move.request_key)
            waiting[move.from_key].remove(request)
            if draw.random() < 0.5:
                num_running[move.to_key] += request.num_choices
            else:
                waiting[move.to_key].append(replace(request, placed_s=cluster.now))
        cluster.now += MIN_STAY_S
        look()
        assert unevenness() < before
