"""The choices of one priority class that wait: who of them goes first.

Owns the order inside a class. Does not know the other classes, or when a class gets its turn.

    preempted | the tenant with the least virtual counter | then the next least | ...
    by order  | earliest deadline, then order             |

Preempted choices were admitted and charged already, so they go first. No tenant of a class can
starve another: how far counters may be apart is `fairness.service_bound`. Inside a tenant earlier
deadlines may keep back choices without one for as long as that tenant sends them; that is its own
doing.

Lists that are kept sorted cost O(log n) comparisons and a move of pointers, some microseconds with
10,000 waiting; heaps would need lazy deletion for what is aborted.
"""

import math
import sys
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Iterator
from operator import attrgetter

from rillgate_server.core.request import PriorityClass, Request, Tenant
from rillgate_server.scheduler.fairness import VirtualCounters
from rillgate_server.scheduler.sequence import Sequence, SequenceState

_order = attrgetter("order")
_AFTER_ALL_ORDERS = (sys.maxsize,)


class _TenantQueue:
    """What one tenant has waiting. State: the fields."""

    __slots__ = ("fresh", "num_choices_of", "num_fresh_tokens", "num_tokens", "weight")

    def __init__(self) -> None:
        self.fresh: list[tuple[float, tuple[int, ...], Sequence]] = []
        """(deadline, order, choice), sorted; none that was preempted."""
        self.num_fresh_tokens = 0
        self.num_choices_of: Counter[int] = Counter()
        """Request id -> its choices that wait, preempted ones too."""
        self.num_tokens = 0
        """Theirs."""
        self.weight = 1.0
        """As its latest request says."""


class ClassQueue:
    """Sequences in state WAITING of one class.

    State: what waits, preempted ones and per tenant; the tenants' counters; sums; since when the
    class waits.
    """

    def __init__(self, priority: PriorityClass) -> None:
        """Start empty."""
        self.priority = priority
        self.counters = VirtualCounters()
        self.num_tokens = 0
        self.waits_since_s = math.inf
        """Since when something waits and nothing was taken; means nothing while it is empty."""
        self._preempted: list[Sequence] = []
        self._num_preempted_tokens = 0
        self._tenants: dict[str, _TenantQueue] = {}
        self._num_choices = 0
        self._last_taken_s = -math.inf

    def __repr__(self) -> str:
        return (
            f"ClassQueue({self.priority.name}, choices={self._num_choices}, "
            f"tokens={self.num_tokens}, tenants={len(self._tenants)})"
        )

    def __len__(self) -> int:
        return self._num_choices

    @property
    def head(self) -> Sequence:
        """The next one; something must wait."""
        if self._preempted:
            return self._preempted[0]
        return self._tenants[self.counters.first()].fresh[0][2]

    def push(self, sequence: Sequence, now: float) -> None:
        """Put a sequence into its place."""
        request, num_tokens = sequence.group.request, len(sequence.token_ids)
        is_preempted = sequence.num_preemptions > 0
        waits_since_s = max(now if is_preempted else request.arrival_s, self._last_taken_s)
        if not self._num_choices or waits_since_s < self.waits_since_s:
            self.waits_since_s = waits_since_s
        tenant = self._tenants.setdefault(request.tenant.name, _TenantQueue())
        tenant.weight = request.tenant.weight
        tenant.num_choices_of[request.request_id] += 1
        tenant.num_tokens += num_tokens
        self.num_tokens += num_tokens
        self._num_choices += 1
        if is_preempted:
            insort(self._preempted, sequence, key=_order)
            self._num_preempted_tokens += num_tokens
            return
        if not tenant.fresh:
            self.counters.enter(request.tenant.name)
        tenant.num_fresh_tokens += num_tokens
        insort(tenant.fresh, (_deadline(request), sequence.order, sequence))

    def take(self, sequence: Sequence, now: float) -> None:
        """Take the head out: the class has its turn."""
        self.remove(sequence)
        self.waits_since_s = self._last_taken_s = now

    def remove(self, sequence: Sequence) -> None:
        """Take any one out."""
        request, num_tokens = sequence.group.request, len(sequence.token_ids)
        tenant = self._tenants[request.tenant.name]
        if sequence.num_preemptions > 0:
            position = bisect_left(self._preempted, sequence.order, key=_order)
            removed = self._preempted.pop(position)
            self._num_preempted_tokens -= num_tokens
        else:
            position = bisect_left(tenant.fresh, (_deadline(request), sequence.order))
            removed = tenant.fresh.pop(position)[2]
            tenant.num_fresh_tokens -= num_tokens
            if not tenant.fresh:
                self.counters.leave(request.tenant.name)
        assert removed is sequence, (removed, sequence)
        self.num_tokens -= num_tokens
        self._num_choices -= 1
        tenant.num_tokens -= num_tokens
        tenant.num_choices_of[request.request_id] -= 1
        if not tenant.num_choices_of[request.request_id]:
            del tenant.num_choices_of[request.request_id]
        if not tenant.num_choices_of:
            del self._tenants[request.tenant.name]

    def num_tokens_ahead(self, request: Request, num_tokens: int) -> int:
        """Return about how many tokens go before a new request of this class with `num_tokens`.

        All preempted ones; its own tenant's with no later deadline; and of each other tenant at
        most its share while those and the request are served:

            sum over others of min(tokens_i, (own tokens ahead + num_tokens) * weight_i / weight)

        Does not look at what counters say now, which is worth `service_bound` at most. O(tenants +
        own choices).
        """
        own = self._tenants.get(request.tenant.name, _NOTHING)
        end = bisect_right(own.fresh, (_deadline(request), _AFTER_ALL_ORDERS))
        if 2 * end < len(own.fresh):
            num_own = _sum_tokens(own.fresh[:end])
        else:  # the other side is shorter, and empty without a deadline
            num_own = own.num_fresh_tokens - _sum_tokens(own.fresh[end:])
        served = (num_own + num_tokens) / request.tenant.weight
        num_others = sum(
            min(tenant.num_fresh_tokens, served * tenant.weight)
            for tenant in self._tenants.values()
            if tenant is not own
        )
        return self._num_preempted_tokens + num_own + int(num_others)

    def charge(self, tenant: Tenant, amount: float) -> None:
        """Charge a tenant for service in this class."""
        self.counters.charge(tenant.name, tenant.weight, amount)

    def sizes(self) -> Iterator[tuple[int, int, PriorityClass, str]]:
        """Yield (tokens, requests, class, tenant) of what waits."""
        for name, tenant in self._tenants.items():
            yield tenant.num_tokens, len(tenant.num_choices_of), self.priority, name

    def check_integrity(self) -> None:
        """Prove orders, states, sums, and who counts as queued."""
        self.counters.check_integrity()
        assert self._preempted == sorted(self._preempted, key=_order)
        assert all(sequence.num_preemptions for sequence in self._preempted)
        waiting = list(self._preempted)
        for name, tenant in self._tenants.items():
            assert tenant.fresh == sorted(tenant.fresh), name
            fresh = [sequence for _, _, sequence in tenant.fresh]
            assert not any(sequence.num_preemptions for sequence in fresh), name
            assert tenant.num_fresh_tokens == _sum_tokens(tenant.fresh), name
            own = fresh + [s for s in self._preempted if s.group.request.tenant.name == name]
            assert tenant.num_tokens == sum(len(s.token_ids) for s in own), name
            assert tenant.num_choices_of == Counter(s.group.request.request_id for s in own), name
            assert own, name
            waiting += fresh
        assert len(waiting) == self._num_choices
        assert self.num_tokens == sum(len(s.token_ids) for s in waiting)
        assert self._num_preempted_tokens == sum(len(s.token_ids) for s in self._preempted)
        assert self.counters.num_queued == sum(bool(t.fresh) for t in self._tenants.values())
        for sequence in waiting:
            assert sequence.group.request.priority is self.priority, sequence
            assert sequence.state is SequenceState.WAITING, sequence
            assert sequence.slot == -1, sequence
            assert not sequence.table.blocks, sequence
            assert sequence.num_computed == 0, sequence


def _sum_tokens(entries: Iterable[tuple[float, tuple[int, ...], Sequence]]) -> int:
    return sum(len(sequence.token_ids) for _, _, sequence in entries)


def _deadline(request: Request) -> float:
    return math.inf if request.deadline_s is None else request.deadline_s


_NOTHING = _TenantQueue()
