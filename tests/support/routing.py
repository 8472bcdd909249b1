"""Replicas as a router sees them, made up by numbers."""

from dataclasses import replace

from rillgate_server.core.block_events import BlockChange, BlockEvent, CacheTier
from rillgate_server.core.block_hash import HASH_SCHEME
from rillgate_server.core.load import EngineLoad, FittedCosts
from rillgate_server.core.welcome import Welcome
from rillgate_server.routing.replica_view import ReplicaView
from rillgate_server.routing.router import Router, RouteRequest, request_hashes

SIZE = 4
WELCOME = Welcome(
    replica_id="r",
    incarnation=1,
    model="demo",
    model_version_digest="00" * 32,
    tokenizer_digest="",
    vocab_size=1000,
    max_context_tokens=4096,
    block_size_tokens=SIZE,
    hash_scheme=HASH_SCHEME,
    kv_dtype="float32",
    max_running=8,
)
COSTS = FittedCosts(step_s=0.008, prefill_token_s=0.001, decode_row_s=0.001)
"""With 8 seats a choice of 128 tokens takes 0.256 s of a full batch: as long as 256 tokens of
prefill."""
IDLE = EngineLoad(costs=COSTS, longest_step_s=0.1)


class Cluster:
    """A router with replicas that are connected and idle, each with a sequence of cache events."""

    def __init__(self, policy: str, num_replicas: int = 3, welcome: Welcome = WELCOME) -> None:
        """Name the replicas a, b, c, …"""
        self.router = Router(policy)
        self.now = 100.0
        self._sequences: dict[str, int] = {}
        for i in range(num_replicas):
            self.add("abcdefgh"[i], welcome)

    def add(self, key: str, welcome: Welcome = WELCOME) -> ReplicaView:
        """Connect one more."""
        view = self.router.add(key)
        view.connected(replace(welcome, replica_id=key), self.now)
        self._sequences[key] = 0
        self.load(key)
        return view

    def view(self, key: str) -> ReplicaView:
        """Return the view of a replica that exists."""
        view = self.router.get(key)
        assert view is not None
        return view

    def load(self, key: str, load: EngineLoad = IDLE) -> None:
        """Let a Load come."""
        self.view(key).heard_load(load, self.now)

    def announce(
        self,
        key: str,
        hashes: list[bytes],
        change: BlockChange = BlockChange.STORED,
        tier: CacheTier = CacheTier.DEVICE,
    ) -> None:
        """Let an event of its cache come."""
        self._sequences[key] += 1
        event = BlockEvent(self._sequences[key], change, tier, tuple(hashes))
        assert self.view(key).apply(event)

    def cache(self, key: str, request: RouteRequest, num_blocks: int | None = None) -> None:
        """Let a replica announce a request's full blocks, or the first of them."""
        welcome = self.view(key).welcome
        assert welcome is not None
        self.announce(key, list(request_hashes(request, welcome))[:num_blocks])

    def choose(self, request: RouteRequest, *excluded: str) -> str | None:
        """Return where a request would go."""
        placement = self.router.choose(request, self.now, frozenset(excluded))
        self.router.check_integrity()
        return placement.key if placement else None

    def send(self, request: RouteRequest) -> str:
        """Send a request where it should go."""
        placement = self.router.choose(request, self.now)
        assert placement is not None
        self.router.sent(placement, request, self.now)
        self.router.check_integrity()
        return placement.key


def prompt(num_tokens: int, first: int = 0) -> RouteRequest:
    """Make a request; another `first` makes another prompt from the first block on."""
    return RouteRequest(tuple((first + i) % 1000 for i in range(num_tokens)))
