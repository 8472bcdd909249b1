"""Who is preferred among the replicas that may take a request: four rules, by name.

Owns each rule's score of one replica; the lowest goes first. Does not know which replicas may be
used, what hashes are, or how ties are broken: the router does.

    prefix                      seconds of work the replica would then have, its cached prefix left
                                out: the longest prefix wins among equally loaded ones, and a
                                prefix that all requests share cannot draw them all to one replica
    least-load                  seconds of work the replica would then have
    round-robin                 whoever waited longest
    weighted-least-connections  connections / weight,
                                weight = free device memory^0.7 * free CPU^0.3
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import pow

from rillgate_server.core.load import EngineLoad, FittedCosts
from rillgate_server.routing.replica_view import ReplicaView

EXPECTED_TOKENS = 128
"""Of an answer, which nobody knows before its end."""
SAME_SPEED_FRACTION = 0.7
"""Of the middle replica's speed, and one over it: in between a replica counts as equally fast.
Fits of equal machines differ by as much, and the one that looks best would win every tie."""
MAX_SPEED_RATIO = 3.0
"""Between a replica's speed and the middle one's, at most. The cost model's fits of equal machines
lay between a twentieth of the truth and 14 times as much, with long contexts and noisy steps. In
benchmarks/replicas' simulation, one of 8 nodes that looks 1000 times too fast makes responses 0.1 s
later with this limit, and 7 s without. Nodes that do differ by 10 lose nothing: what is slow to end
adds up, and that counts, too."""
MIN_FREE_FRACTION = 0.01
"""A share below this counts as this: a full node has a small weight, never none. (A replica that
computes on the CPU leaves none of it free.)"""
MEMORY_POWER, CPU_POWER = 0.7, 0.3
"""Of the free shares in a node's weight: the deployment guide's."""

_STANDARD_PREFILL_TOKENS, _STANDARD_DECODE_ROWS = 256, 32
"""The step by which speeds are compared: its sum is known long before its parts are."""
_UNMEASURED = FittedCosts(step_s=0.01, prefill_token_s=1e-4, decode_row_s=1e-4)
"""While no replica has measured anything: only how prefill and decode compare matters."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request asks of a replica."""

    num_choices: int
    num_tokens: int
    """Of prompt and continuation, cached or not."""


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What work costs on the middle one of the replicas.

    One number per replica says how much faster or slower it is. (Each one's own fitted costs would
    not do: what a fit gives to the step, to tokens and to rows depends on what it happened to see.
    Nor would the fastest's: that is the one whose fit may be the most wrong.)
    """

    costs: FittedCosts
    middle_s: float
    """Of the standard step; 0: nobody measured one."""

    @classmethod
    def of(cls, views: Iterable[ReplicaView]) -> "Yardstick":
        """Measure by the middle one of `views`; of two in the middle, by the faster."""
        measured = [
            (seconds, view.load.costs)
            for view in views
            if view.load is not None and (seconds := _standard_step_s(view.load)) > 0.0
        ]
        if not measured:
            return cls(_UNMEASURED, 0.0)
        measured.sort(key=lambda it: it[0])
        middle_s, costs = measured[(len(measured) - 1) // 2]
        return cls(costs, middle_s)

    def speed(self, view: ReplicaView) -> float:
        """Return a replica's speed over the middle one's, within the limits above.

        One that has measured nothing counts as the middle one: with much less it would get no
        requests, and never measure any.
        """
        seconds = _standard_step_s(view.load) if view.load is not None else 0.0
        if seconds == 0.0:
            return 1.0
        speed = self.middle_s / seconds
        if SAME_SPEED_FRACTION <= speed <= 1 / SAME_SPEED_FRACTION:
            return 1.0
        return min(max(speed, 1 / MAX_SPEED_RATIO), MAX_SPEED_RATIO)

    def work_s(self, view: ReplicaView, num_prefill_tokens: int, num_decode_tokens: int) -> float:
        """Predict the seconds in which a replica computes so much, with a full batch."""
        costs = self.costs
        seats = view.welcome.max_running if view.welcome else 1
        decode_token_s = costs.step_s / seats + costs.decode_row_s
        seconds = num_prefill_tokens * costs.prefill_token_s + num_decode_tokens * decode_token_s
        return seconds / self.speed(view)


Score = tuple[float, ...]
"""Compared in order; the lowest goes first."""
ScoreFunction = Callable[[ReplicaView, Demand, int, Yardstick], Score]
"""Takes a replica, the request, the request's tokens that it has cached, and the yardstick."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One rule."""

    score: ScoreFunction
    uses_prefixes: bool = False
    """Whether it wants to know what is cached; that costs the hashes of the request."""


def predicted_work(expected_tokens: int = EXPECTED_TOKENS) -> ScoreFunction:
    """Return the score of the load: the seconds of work that a replica would have."""

    def score(
        view: ReplicaView, demand: Demand, num_cached_tokens: int, yardstick: Yardstick
    ) -> Score:
        num_choices = view.num_choices + demand.num_choices
        num_tokens = view.num_tokens_to_compute + demand.num_tokens - num_cached_tokens
        seats = view.welcome.max_running if view.welcome else 1
        work_s = yardstick.work_s(view, num_tokens, num_choices * expected_tokens)
        # Where prompts were all cached of late, the fit may know no cost of a token: a hit still
        # decides between equals.
        return work_s, -num_cached_tokens, num_choices / seats

    return score


def _nothing(
    view: ReplicaView, demand: Demand, num_cached_tokens: int, yardstick: Yardstick
) -> Score:
    return ()


def _connections_per_weight(
    view: ReplicaView, demand: Demand, num_cached_tokens: int, yardstick: Yardstick
) -> Score:
    weight = node_weight(view)
    # Among nodes without connections the one with the largest weight; what only wavers is a tie.
    return view.num_open / weight, -round(weight, 1)


def node_weight(view: ReplicaView) -> float:
    """Return a node's weight by what it has free, above 0 and at most 1.

    The guide prints it with the shares that are in use. A request goes to the smallest
    connections/weight, so that would prefer the node with the largest usage, the fullest, and make
    it fuller; the rule only spreads work with the shares that are free.
    """
    load = view.load
    if load is None:
        return 1.0
    memory = max(load.free_device_fraction, MIN_FREE_FRACTION)
    return pow(memory, MEMORY_POWER) * pow(
        max(load.free_cpu_fraction, MIN_FREE_FRACTION), CPU_POWER
    )


def _standard_step_s(load: EngineLoad) -> float:
    """Return 0 until a replica has measured prefill and decode both: half a sum looks fast."""
    if load.longest_step_s == 0.0:
        return 0.0
    costs = load.costs
    return (
        costs.step_s
        + _STANDARD_PREFILL_TOKENS * costs.prefill_token_s
        + _STANDARD_DECODE_ROWS * costs.decode_row_s
    )


POLICIES: dict[str, Policy] = {
    # name -> rule; the names of config.groups.ROUTING_POLICIES
    "prefix": Policy(predicted_work(), uses_prefixes=True),
    "least-load": Policy(predicted_work()),
    "round-robin": Policy(_nothing),
    "weighted-least-connections": Policy(_connections_per_weight),
}
