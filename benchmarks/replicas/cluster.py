"""The real router over simulated nodes, on a clock of events: minutes of a cluster take seconds.

Owns the loop of events and what is counted: how evenly the load lay, what requests waited, what was
cached. Uses the router as a gateway does: views are fed by Loads every 200 ms and by the caches'
events, requests are sent and ended.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean, pstdev

from benchmarks.replicas.node import BLOCK_SIZE_TOKENS, Node, NodeSpec
from benchmarks.replicas.traffic import SimRequest, Traffic
from rillgate_server.core.block_hash import HASH_SCHEME
from rillgate_server.core.load import EngineLoad
from rillgate_server.core.welcome import Welcome
from rillgate_server.routing.policies import Policy
from rillgate_server.routing.rebalance import WaitingRequest, plan_moves
from rillgate_server.routing.replica_view import Ticket
from rillgate_server.routing.router import Placement, Router, RouteRequest

LOAD_EVERY_S, SAMPLE_EVERY_S, MOVE_EVERY_S = 0.2, 0.1, 0.2
WELCOME = Welcome(
    "sim", 1, "sim", "00" * 32, "", 32_000, 1 << 20, BLOCK_SIZE_TOKENS, HASH_SCHEME, "bfloat16", 1
)


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to route."""

    name: str
    policy: Policy
    edit_load: Callable[[EngineLoad], EngineLoad] = lambda load: load
    """What the router is told in place of a Load."""
    moves_waiting: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """What one run gave."""

    load_cv: float
    """Coefficient of variation over the nodes of the seconds of work in them, mean over time."""
    memory_cv: float
    """The same of the share of blocks in use."""
    mean_response_s: float
    p99_response_s: float
    mean_ttft_s: float
    p99_ttft_s: float
    hit_fraction: float
    """Of prompt tokens."""
    num_requests: int
    num_moves: int


@dataclass(slots=True)
class _Sent:
    """A request somewhere."""

    key: str
    ticket: Ticket
    placed_s: float


@dataclass(slots=True)
class _Tally:
    load_cvs: list[float] = field(default_factory=list)
    memory_cvs: list[float] = field(default_factory=list)
    responses_s: list[float] = field(default_factory=list)
    ttfts_s: list[float] = field(default_factory=list)
    num_moves: int = 0


class Cluster:
    """One run.

    State: nodes and router, the heap of events, what is sent where, who waits, the tally.
    """

    def __init__(
        self, specs: tuple[NodeSpec, ...], contestant: Contestant, traffic: Traffic, seed: int
    ) -> None:
        """Connect the router to idle nodes."""
        self._contestant = contestant
        self._traffic = traffic
        self._router = Router(contestant.policy)
        self._nodes = {spec.key: Node(spec) for spec in specs}
        self._busy_at_load = dict.fromkeys(self._nodes, 0.0)
        self._stepping: set[str] = set()
        self._sent: dict[SimRequest, _Sent] = {}
        self._waiting: dict[str, dict[SimRequest, None]] = {key: {} for key in self._nodes}
        self._numbers = itertools.count()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._tally = _Tally()
        self.now = 0.0
        draw = random.Random(f"{seed} phases")
        for spec in specs:
            view = self._router.add(spec.key)
            view.connected(replace(WELCOME, max_running=spec.max_running), 0.0)
            self._tell_load(spec.key)
            self._every(LOAD_EVERY_S, draw.random(), partial(self._tell_load, spec.key))

    def run(self, seconds: float, warm_up_s: float) -> Run:
        """Let users come for `seconds`; count what happens after the warm-up."""
        self._at(self._traffic.next_start_s(0.0), self._begin_conversation)
        self._every(SAMPLE_EVERY_S, 0.0, lambda: self._sample(warm_up_s))
        if self._contestant.moves_waiting:
            self._every(MOVE_EVERY_S, 0.5, self._move)
        while self._heap and self._heap[0][0] < seconds:
            self.now, _, act = heapq.heappop(self._heap)
            act()
        self._router.check_integrity()
        return self._result()

    # -- events -----------------------------------------------------------------------------------

    def _at(self, when_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when_s, next(self._numbers), act))

    def _every(self, period_s: float, phase: float, act: Callable[[], None]) -> None:
        def again() -> None:
            act()
            self._at(self.now + period_s, again)

        self._at(self.now + phase * period_s, again)

    def _begin_conversation(self) -> None:
        self._ask(self._traffic.begin(self.now))
        self._at(self._traffic.next_start_s(self.now), self._begin_conversation)

    def _ask(self, request: SimRequest) -> None:
        route = RouteRequest(request.prompt)
        placement = self._router.choose(route, self.now)
        assert placement is not None
        self._place(request, route, placement)

    def _place(self, request: SimRequest, route: RouteRequest, placement: Placement) -> None:
        ticket = self._router.sent(placement, route, self.now)
        self._sent[request] = _Sent(placement.key, ticket, self.now)
        self._waiting[placement.key][request] = None
        self._nodes[placement.key].add(request, self.now)
        self._step(placement.key)

    def _step(self, key: str) -> None:
        """Begin a step if none is under way."""
        node = self._nodes[key]
        if key in self._stepping or not node.has_work:
            return
        self._stepping.add(key)
        began_s = self.now
        self._at(self.now + node.begin_step(), lambda: self._end_step(key, began_s))

    def _end_step(self, key: str, began_s: float) -> None:
        self._stepping.discard(key)
        node, view = self._nodes[key], self._router.get(key)
        first, last = node.end_step(began_s, self.now)
        assert view is not None
        for event in node.take_events():
            assert view.apply(event)
        for request in first:
            request.first_token_s = self.now
            del self._waiting[key][request]
        for request in last:
            self._finish(request)
        self._step(key)

    def _finish(self, request: SimRequest) -> None:
        self._router.ended(self._sent.pop(request).ticket)
        self._tally.responses_s.append(self.now - request.due_s)
        self._tally.ttfts_s.append(request.first_token_s - request.due_s)
        if (follow_up := self._traffic.follow_up(request, self.now)) is not None:
            self._at(follow_up.due_s, lambda: self._ask(follow_up))

    def _tell_load(self, key: str) -> None:
        node, view = self._nodes[key], self._router.get(key)
        assert view is not None
        busy = (node.busy_s - self._busy_at_load[key]) / LOAD_EVERY_S
        self._busy_at_load[key] = node.busy_s
        load = node.load(self.now, min(1.0, busy))
        view.heard_load(self._contestant.edit_load(load), self.now)

    def _move(self) -> None:
        by_key: dict[str, SimRequest] = {}
        waiting: dict[str, list[WaitingRequest]] = {}
        for key, requests in self._waiting.items():
            waiting[key] = []
            for request in sorted(requests, key=lambda it: self._sent[it].placed_s):
                name = str(len(by_key))
                by_key[name] = request
                waiting[key].append(WaitingRequest(name, 1, self._sent[request].placed_s))
        for move in plan_moves(self._router.views, waiting, self.now):
            request = by_key[move.request_key]
            if not self._nodes[move.from_key].remove(request):
                continue  # it is being computed
            del self._waiting[move.from_key][request]
            self._router.ended(self._sent.pop(request).ticket)
            self._tally.num_moves += 1
            self._place(request, RouteRequest(request.prompt), Placement(move.to_key, 0))

    # -- what is counted --------------------------------------------------------------------------

    def _sample(self, warm_up_s: float) -> None:
        if self.now < warm_up_s:
            return
        nodes = self._nodes.values()
        self._tally.load_cvs.append(_variation([node.backlog_s for node in nodes]))
        self._tally.memory_cvs.append(_variation([node.used_fraction for node in nodes]))

    def _result(self) -> Run:
        tally, nodes = self._tally, self._nodes.values()
        return Run(
            fmean(tally.load_cvs),
            fmean(tally.memory_cvs),
            fmean(tally.responses_s),
            _percentile(tally.responses_s, 0.99),
            fmean(tally.ttfts_s),
            _percentile(tally.ttfts_s, 0.99),
            sum(node.num_hit_tokens for node in nodes)
            / sum(node.num_sent_tokens for node in nodes),
            len(tally.responses_s),
            tally.num_moves,
        )


def _variation(values: list[float]) -> float:
    """Return standard deviation over mean; 0 where nothing is."""
    mean = fmean(values)
    return pstdev(values) / mean if mean > 0.0 else 0.0


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]
