"""Each policy's rule, as the router applies it."""

from collections import Counter
from dataclasses import replace

import pytest

from rillgate_server.config.groups import ROUTING_POLICIES
from rillgate_server.core.load import EngineLoad, FittedCosts
from rillgate_server.errors import ConfigError
from rillgate_server.routing.policies import POLICIES, node_weight
from rillgate_server.routing.router import Router, RouteRequest
from tests.support.routing import COSTS, IDLE, WELCOME, Cluster, prompt

SLOW = FittedCosts(step_s=0.016, prefill_token_s=0.002, decode_row_s=0.002)


def test_every_policy_that_a_setting_may_name_exists() -> None:
    """The names are those of the setting, in no other spelling."""
    assert tuple(POLICIES) == ROUTING_POLICIES
    with pytest.raises(ConfigError, match=r"'random'; allowed: prefix, least-load"):
        Router("random")


@pytest.mark.parametrize("policy", ROUTING_POLICIES)
def test_equals_take_turns(policy: str) -> None:
    """Idle replicas without difference get the same number of requests, in turns."""
    cluster = Cluster(policy)
    sent = [cluster.send(prompt(20, first=100 * i)) for i in range(9)]
    assert sent[:3] == sent[3:6] == sent[6:]
    assert set(sent) == {"a", "b", "c"}


# -- round-robin ----------------------------------------------------------------------------------


def test_plain_rotation_goes_on_when_replicas_come_and_go() -> None:
    """Who waited longest is next, whatever the loads say."""
    cluster = Cluster("round-robin")
    cluster.load("b", replace(IDLE, num_running=8, num_waiting=100))
    assert [cluster.send(prompt(8)) for _ in range(4)] == ["a", "b", "c", "a"]
    cluster.add("d")
    cluster.router.remove("b")
    assert [cluster.send(prompt(8)) for _ in range(4)] == ["d", "c", "a", "d"]


# -- least-load -----------------------------------------------------------------------------------


def test_the_least_load_wins() -> None:
    """Running and waiting choices count, and so do tokens that wait for their prefill."""
    cluster = Cluster("least-load")
    cluster.load("a", replace(IDLE, num_running=3))
    cluster.load("b", replace(IDLE, num_running=1, num_waiting=1))
    cluster.load("c", replace(IDLE, num_running=1, num_waiting_tokens=900))
    assert cluster.choose(prompt(8)) == "b"
    cluster.load("c", replace(IDLE, num_running=1, num_waiting_tokens=100))
    assert cluster.choose(prompt(8)) == "c"


def test_load_is_weighed_by_speed() -> None:
    """A replica that takes twice as long for everything gets half as much."""
    cluster = Cluster("least-load", 2)
    cluster.load("b", replace(IDLE, costs=SLOW))
    sent = Counter(cluster.send(prompt(8)) for _ in range(30))
    assert sent == {"a": 20, "b": 10}


def test_replicas_that_measured_a_little_differently_are_equals() -> None:
    """Or the one whose fit looks best would get every request of an idle service."""
    cluster = Cluster("least-load", 2)
    cluster.load("a", replace(IDLE, costs=replace(COSTS, prefill_token_s=0.0014)))
    assert Counter(cluster.send(prompt(8)) for _ in range(30)) == {"a": 15, "b": 15}


def test_a_replica_that_has_measured_nothing_gets_requests() -> None:
    """It counts as the others do: without requests it would never measure anything."""
    cluster = Cluster("least-load", 2)
    cluster.load("b", EngineLoad())
    assert Counter(cluster.send(prompt(8)) for _ in range(30)) == {"a": 15, "b": 15}


@pytest.mark.parametrize("factor", [0.1, 1e-6])
def test_a_fit_that_is_far_too_low_does_not_draw_everything(factor: float) -> None:
    """It counts as three times as fast as the others at most, and they as equals still."""
    cluster = Cluster("least-load", 5)
    wrong = FittedCosts(
        COSTS.step_s * factor,
        COSTS.prefill_token_s * factor,
        decode_row_s=COSTS.decode_row_s * factor,
    )
    cluster.load("a", replace(IDLE, costs=wrong))
    cluster.load("e", replace(IDLE, costs=SLOW))
    sent = Counter(cluster.send(prompt(8)) for _ in range(130))
    assert sent == {"a": 60, "b": 20, "c": 20, "d": 20, "e": 10}


def test_a_fit_that_is_far_too_high_does_not_starve_its_replica() -> None:
    """It gets a third of the others' share at least, and measures anew."""
    cluster = Cluster("least-load", 4)
    cluster.load("d", replace(IDLE, costs=FittedCosts(10.0, 1.0, decode_row_s=1.0)))
    sent = Counter(cluster.send(prompt(8)) for _ in range(100))
    assert sent == {"a": 30, "b": 30, "c": 30, "d": 10}


def test_half_a_measurement_is_none() -> None:
    """What has only prefilled so far would look fast beside one that knows its decode steps."""
    cluster = Cluster("least-load", 2)
    prefill_alone = FittedCosts(prefill_token_s=COSTS.prefill_token_s / 2)
    cluster.load("a", EngineLoad(costs=prefill_alone))
    assert Counter(cluster.send(prompt(8)) for _ in range(30)) == {"a": 15, "b": 15}
    cluster = Cluster("least-load", 2)
    cluster.load("a", EngineLoad(costs=prefill_alone))
    cluster.load("b", EngineLoad())
    assert Counter(cluster.send(prompt(8)) for _ in range(30)) == {"a": 15, "b": 15}


def test_more_seats_take_more() -> None:
    """Where a step costs the same with few rows and many, the larger batch gets more of them."""
    cluster = Cluster("least-load", 0)
    costs = FittedCosts(step_s=0.02)
    for key, seats in (("a", 8), ("b", 24)):
        cluster.add(key, replace(WELCOME, max_running=seats))
        cluster.load(key, EngineLoad(costs=costs, longest_step_s=0.1))
    assert Counter(cluster.send(prompt(8)) for _ in range(16)) == {"a": 4, "b": 12}


def test_costs_of_nothing_still_spread_by_seats() -> None:
    """A fit may give all of a step to its context; choices are counted then."""
    cluster = Cluster("least-load", 2)
    context_alone = replace(IDLE, costs=FittedCosts(decode_context_s=1e-6))
    cluster.load("a", replace(context_alone, num_running=2))
    cluster.load("b", replace(context_alone, num_running=1))
    assert cluster.choose(prompt(8)) == "b"


@pytest.mark.parametrize("policy", ["prefix", "least-load", "weighted-least-connections"])
def test_a_burst_between_two_loads_spreads(policy: str) -> None:
    """What was sent since the last Load counts, though no Load says so."""
    cluster = Cluster(policy)
    cluster.load("a", replace(IDLE, num_running=1))
    sent = Counter(cluster.send(prompt(20, first=30 * i)) for i in range(30))
    assert max(sent.values()) - min(sent.values()) <= 1, sent


# -- prefix ---------------------------------------------------------------------------------------


def test_the_longest_prefix_wins_among_equals() -> None:
    """Who holds more of the request's beginning, in either tier, computes less."""
    cluster = Cluster("prefix")
    request = prompt(40)
    cluster.cache("b", request, 4)
    cluster.cache("c", request, 7)
    placement = cluster.router.choose(request, cluster.now)
    assert placement is not None
    assert (placement.key, placement.num_cached_tokens) == ("c", 28)
    assert cluster.choose(prompt(40, first=500)) == "a", "another prompt finds nothing"


def test_a_hit_decides_where_a_token_seems_to_cost_nothing() -> None:
    """After many hits the fit of the replica that has the prefix gives prefill no cost at all."""
    cluster = Cluster("prefix")
    free = replace(COSTS, prefill_token_s=0.0)
    for key in "abc":
        cluster.load(key, replace(IDLE, costs=free))
    cluster.cache("c", prompt(32))
    assert [cluster.choose(prompt(32)) for _ in range(3)] == ["c"] * 3


def test_a_prefix_is_worth_what_it_saves() -> None:
    """200 cached tokens (0.2 s) do not outweigh one more choice (0.256 s); 300 do."""
    cluster = Cluster("prefix", 2)
    request = prompt(320)
    cluster.load("b", replace(IDLE, num_running=1))
    cluster.cache("b", request, 50)
    assert cluster.choose(request) == "a"
    cluster.cache("b", request, 75)
    assert cluster.choose(request) == "b"


def test_a_prefix_that_all_share_does_not_draw_them_all_to_one() -> None:
    """A system prompt that one replica cached first: the others soon take requests too."""
    cluster = Cluster("prefix")
    cluster.cache("a", prompt(600))
    sent = []
    for i in range(24):
        request = RouteRequest((*range(600), *([i] * 20)))
        sent.append(cluster.send(request))
        cluster.cache(sent[-1], request)
    assert sent[:3] == ["a", "a", "a"], "the prefix is worth more than two choices"
    assert max(Counter(sent).values()) == 10, "as many as the others have, and those two"


# -- weighted-least-connections -------------------------------------------------------------------


def test_connections_follow_the_free_shares() -> None:
    """A node with half its memory free gets 0.5 ** 0.7 as many as an empty one."""
    cluster = Cluster("weighted-least-connections", 2)
    cluster.load("b", replace(IDLE, free_device_fraction=0.5))
    sent = Counter(cluster.send(prompt(8)) for _ in range(162))
    assert sent["a"] == pytest.approx(162 / (1 + 0.5**0.7), abs=1)


def test_the_emptiest_node_is_preferred_and_not_the_fullest() -> None:
    """The formula as printed, with usage in place of free shares, gives the opposite."""
    cluster = Cluster("weighted-least-connections", 2)
    usages = {"a": 0.9, "b": 0.1}
    for key, usage in usages.items():
        cluster.send(prompt(8))
        cluster.load(
            key, replace(IDLE, free_device_fraction=1 - usage, free_cpu_fraction=1 - usage)
        )
    assert cluster.choose(prompt(8)) == "b"
    printed = {key: 1 / (usage**0.7 * usage**0.3) for key, usage in usages.items()}
    assert min(printed, key=lambda key: printed[key]) == "a"


def test_a_full_node_has_a_weight() -> None:
    """With nothing free at all the rule still compares connections."""
    cluster = Cluster("weighted-least-connections", 2)
    for key in "ab":
        cluster.load(key, replace(IDLE, free_device_fraction=0.0, free_cpu_fraction=0.0))
    assert 0.0 < node_weight(cluster.view("a")) < 0.02
    assert Counter(cluster.send(prompt(8)) for _ in range(8)) == {"a": 4, "b": 4}


def test_weights_that_waver_a_little_decide_nothing_among_idle_nodes() -> None:
    """The share of free CPU is never twice the same; equal nodes still take turns."""
    cluster = Cluster("weighted-least-connections", 2)
    sent = []
    for i in range(8):
        cluster.load("a", replace(IDLE, free_cpu_fraction=0.70 + 0.002 * i))
        cluster.load("b", replace(IDLE, free_cpu_fraction=0.69))
        placement = cluster.router.choose(prompt(8), cluster.now)
        assert placement is not None
        cluster.router.ended(cluster.router.sent(placement, prompt(8), cluster.now))
        sent.append(placement.key)
    assert Counter(sent) == {"a": 4, "b": 4}


def test_without_connections_the_heaviest_node_is_first() -> None:
    """Nothing divided by anything is nothing: the weight decides."""
    cluster = Cluster("weighted-least-connections")
    cluster.load("a", replace(IDLE, free_cpu_fraction=0.2))
    cluster.load("b", replace(IDLE, free_cpu_fraction=0.9))
    cluster.load("c", replace(IDLE, free_cpu_fraction=0.5))
    assert cluster.choose(prompt(8)) == "b"
