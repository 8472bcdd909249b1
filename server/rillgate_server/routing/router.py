"""Where a request goes: the replica that the policy prefers among those that may be used.

Owns the views of all replicas and the order in which ties go around. Does not know connections,
streams or time of its own; decides and changes nothing outside.

    router.add(key) ─▶ view, which the link to that replica feeds
    choose(request, now, excluded) ─▶ Placement | None ─▶ submit
    sent(placement, request, now) ─▶ Ticket ─▶ the request's end, or its move ─▶ ended(ticket)
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from rillgate_server.core.block_hash import chained_hashes, root_hash
from rillgate_server.core.request import NO_SALT
from rillgate_server.core.submission import Submission
from rillgate_server.core.welcome import Welcome
from rillgate_server.errors import ConfigError
from rillgate_server.routing.policies import POLICIES, Demand, Policy, Score, Yardstick
from rillgate_server.routing.replica_view import ReplicaView, Ticket

_STRETCH_BLOCKS = 64
"""Of a chain that are hashed at once."""


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What routing reads of a request."""

    prompt_token_ids: tuple[int, ...]
    generated_token_ids: tuple[int, ...] = ()
    """Of the first unfinished choice, to be replayed; hashed as the prompt is."""
    cache_salt: bytes = NO_SALT
    """16 bytes."""
    num_shared_prefix_tokens: int = 0
    num_choices: int = 1
    """Unfinished ones."""
    num_replayed_tokens: int = 0
    """Of all choices."""

    @classmethod
    def of(cls, submission: Submission) -> "RouteRequest":
        """Read a request that is about to be submitted."""
        choices = submission.choices
        return cls(
            submission.prompt_token_ids,
            choices[0].generated_token_ids,
            submission.cache_salt,
            submission.num_shared_prefix_tokens,
            len(choices),
            sum(len(choice.generated_token_ids) for choice in choices),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens to compute before the first new one of every choice."""
        return len(self.prompt_token_ids) + self.num_replayed_tokens


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes."""

    key: str
    """Of the replica."""
    num_cached_tokens: int
    """Of the request's beginning, as the replica announced; 0 if the policy does not ask."""


class Router:
    """Picks replicas by one policy.

    State: the views by key, and how often something was sent.
    """

    def __init__(self, policy: str | Policy) -> None:
        """Start without replicas. Raises ConfigError for a name that no policy has.

        A Policy of one's own is for comparisons.
        """
        if isinstance(policy, str):
            if policy not in POLICIES:
                allowed = ", ".join(POLICIES)
                raise ConfigError(f"gateway.routing_policy is {policy!r}; allowed: {allowed}")
            policy = POLICIES[policy]
        self._policy = policy
        self._views: dict[str, ReplicaView] = {}  # key -> view
        self._num_sent = 0

    def __repr__(self) -> str:
        return f"Router({list(self._views.values())}, sent={self._num_sent})"

    # -- replicas ---------------------------------------------------------------------------------

    def add(self, key: str) -> ReplicaView:
        """Know one more replica, not connected yet; its owner feeds the view."""
        assert key not in self._views, f"replica {key!r} is known already"
        view = self._views[key] = ReplicaView(key)
        return view

    def remove(self, key: str) -> None:
        """Know a replica no more."""
        del self._views[key]

    def get(self, key: str) -> ReplicaView | None:
        """Return a replica's view."""
        return self._views.get(key)

    @property
    def views(self) -> tuple[ReplicaView, ...]:
        """All replicas, in the order in which they were added."""
        return tuple(self._views.values())

    # -- requests ---------------------------------------------------------------------------------

    def choose(
        self, request: RouteRequest, now: float, excluded: frozenset[str] = frozenset()
    ) -> Placement | None:
        """Return where a request goes now; None: no replica can take it.

        Changes nothing. Among equals it is the one that was sent nothing for longest.
        """
        views = [
            view
            for view in self._views.values()
            if view.key not in excluded and view.is_usable(now)
        ]
        if not views:
            return None
        cached = self._count_cached(request, views) if self._policy.uses_prefixes else {}
        yardstick = Yardstick.of(views)
        demand = Demand(request.num_choices, request.num_tokens)

        def order(view: ReplicaView) -> tuple[Score, int]:
            score = self._policy.score(view, demand, cached.get(view.key, 0), yardstick)
            return score, view.last_sent_number

        best = min(views, key=order)
        return Placement(best.key, cached.get(best.key, 0))

    def sent(self, placement: Placement, request: RouteRequest, now: float) -> Ticket:
        """Count a request that was submitted where `choose` said; give the ticket to `ended`."""
        num_tokens = max(0, request.num_tokens - placement.num_cached_tokens)
        ticket = Ticket(placement.key, request.num_choices, num_tokens, now)
        if view := self._views.get(placement.key):
            self._num_sent += 1
            view.last_sent_number = self._num_sent
            view.sent(ticket)
        return ticket

    def ended(self, ticket: Ticket) -> None:
        """Count a request no more: finished, refused, broken or moved. Idempotent."""
        if view := self._views.get(ticket.key):
            view.ended(ticket)

    def check_integrity(self) -> None:
        """Prove every view's invariants, and that turns are distinct."""
        for key, view in self._views.items():
            assert view.key == key
            view.check_integrity()
        turns = [view.last_sent_number for view in self._views.values() if view.last_sent_number]
        assert len(set(turns)) == len(turns)
        assert max(turns, default=0) <= self._num_sent

    # -- prefixes ---------------------------------------------------------------------------------

    def _count_cached(self, request: RouteRequest, views: Iterable[ReplicaView]) -> dict[str, int]:
        """Return how many of the request's tokens each replica holds; equal ones share a chain."""
        spaces: dict[tuple[str, str, int], list[ReplicaView]] = {}
        for view in views:
            welcome = view.welcome
            if welcome is not None and view.num_blocks:
                space = (welcome.model_version_digest, welcome.kv_dtype, welcome.block_size_tokens)
                spaces.setdefault(space, []).append(view)
        cached: dict[str, int] = {}
        for (_, _, size), alike in spaces.items():
            assert alike[0].welcome is not None
            chain = request_hashes(request, alike[0].welcome)
            counts = _count_leading(chain, alike)
            cached |= {key: num_blocks * size for key, num_blocks in counts.items()}
        return cached


def _count_leading(chain: Iterator[bytes], views: list[ReplicaView]) -> dict[str, int]:
    """Return how many blocks at the beginning of a chain each view holds.

    A chain is hashed no farther than the stretch where the last of them ends: that takes longer
    than all else.
    """
    counts = {view.key: 0 for view in views}
    while views and (stretch := list(islice(chain, _STRETCH_BLOCKS))):
        found = {view.key: view.count_leading(stretch) for view in views}
        for key, num_blocks in found.items():
            counts[key] += num_blocks
        views = [view for view in views if found[view.key] == len(stretch)]
    return counts


def request_hashes(request: RouteRequest, welcome: Welcome) -> Iterator[bytes]:
    """Iterate over the hashes of a request's full blocks as that replica computes them.

    The last token is never a hit (somebody needs its logits), so neither is a block that ends with
    it: kvcache.block_table and kvcache.manager say the same.
    """
    size = welcome.block_size_tokens
    token_ids = request.prompt_token_ids + request.generated_token_ids
    num_blocks = (len(token_ids) - 1) // size
    if num_blocks <= 0:
        return iter(())
    num_shared = request.num_shared_prefix_tokens // size
    salts = [NO_SALT if i < num_shared else request.cache_salt for i in range(num_blocks)]
    root = root_hash(welcome.model_version_digest, welcome.kv_dtype, size)
    return chained_hashes(root, salts, token_ids[: num_blocks * size])
