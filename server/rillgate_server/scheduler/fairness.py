"""Who has had how much: virtual token counters, one per tenant, for one priority class.

Owns the counters, what is charged, and the bound that follows. Does not know requests, the queue's
order inside a tenant, or classes: each class has counters of its own, so that a tenant's work in
one class never costs it its turn in another.

Method: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024 (VTC). The tenant with
the least counter is served next, and a counter grows by

    W_INPUT       per input token that has to be computed, when its choice starts
    W_OUTPUT      per output token, when it is sampled
    W_KV_SECOND   per token held in the cache and second, after each step

over the tenant's weight. A prefix hit costs no computation and is not charged; holding it is. A
preempted choice is not charged again for what is computed again: that was our decision.

Lift: a tenant that comes back with nothing queued starts at no less than the least counter of
those who are queued (when nobody is, of the last that was), so idleness earns no credit. An account
that could only be lifted is forgotten; where more than MAX_IDLE_ACCOUNTS are in debt, the smallest
debts are forgotten by raising `floor` over them, and nobody enters below the floor. So forgetting
never forgives a debt.

The bound. Let M be the most tokens that the choices of one tenant may hold which have started and
not ended (prompt and answer to its end; without preemption the cache's size is such a limit), and T
the longest time that a choice runs. A tenant's counter is the least of those queued when one of its
choices is taken, and until the next is taken it grows only by what the started ones still cost:
each of their tokens once, as input or as output, and each for at most T seconds. So among those who
are queued, no counter is further ahead of the least than

    U = (max(W_INPUT * longest input, W_OUTPUT * M) + W_KV_SECOND * M * T) / weight

and two tenants that are queued all the time get services, over their weights, that differ by at
most 2 U over any interval: the paper's theorem for backlogged clients, and a term for what is held.
"""

from heapq import heapify, heappop, heappush, heapreplace
from itertools import count

W_INPUT = 1.0
"""Per input token: the unit of service."""
W_OUTPUT = 2.0
"""Per output token: as in the paper, after the usual ratio of prices."""
W_KV_SECOND = 0.02
"""Per token held and second. Memory-bound decoding reads the weights once per step for all rows,
and each row's keys and values: for 8 billion bf16 parameters and 64 rows the row's part of the
weights is 250 MB, as much as 1,900 tokens of 128 KiB. So a held token costs 1/2000 of an output
token (W_OUTPUT / 2000 = 0.001) per step, of which there are 20 a second."""

MAX_IDLE_ACCOUNTS = 4096
"""Tenants without queued requests whose debt is remembered, per class: about 1 MB."""


def service_bound(
    max_input_tokens: int, max_held_tokens: int, max_run_s: float, weight: float = 1.0
) -> float:
    """Return 2 U: how far two backlogged tenants' services over their weights may be apart.

    `max_held_tokens` is M and `max_run_s` T of the module's docstring; `weight` the lesser one.
    """
    computed = max(W_INPUT * max_input_tokens, W_OUTPUT * max_held_tokens)
    return 2 * (computed + W_KV_SECOND * max_held_tokens * max_run_s) / weight


class _Account:
    """A tenant's counter. `rank` breaks ties: who has been queued for longer goes first."""

    __slots__ = ("counter", "is_queued", "rank")

    def __init__(self, counter: float, rank: int) -> None:
        self.counter = counter
        self.rank = rank
        self.is_queued = False


class VirtualCounters:
    """The accounts of one class.

    State: accounts by tenant; a heap of (counter, rank, tenant) with exactly one entry each; the
    floor; who left the queue last. Counters and ranks only grow, so an entry is at most too small,
    and is put right when it comes to the top: a charge costs O(1).
    """

    def __init__(self) -> None:
        """Start without accounts."""
        self.floor = 0.0
        """Nobody enters below; no forgotten counter is above."""
        self.num_queued = 0
        self._accounts: dict[str, _Account] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._ranks = count()
        self._last_left = ""

    def __repr__(self) -> str:
        return (
            f"VirtualCounters(queued={self.num_queued}, accounts={len(self._accounts)}, "
            f"floor={self.floor:.1f})"
        )

    def __len__(self) -> int:
        """Accounts that are remembered."""
        return len(self._accounts)

    def counter(self, tenant: str) -> float:
        """Return the service that a tenant has had, over its weight, as the order sees it."""
        account = self._accounts.get(tenant)
        return self.floor if account is None else account.counter

    def enter(self, tenant: str) -> None:
        """Note that a tenant, with nothing queued until now, has something; lift its counter."""
        least = self.counter(self.first() if self.num_queued else self._last_left)
        account = self._accounts.get(tenant) or self._open(tenant)
        assert not account.is_queued, tenant
        account.counter = max(account.counter, least, self.floor)
        account.rank = next(self._ranks)
        account.is_queued = True
        self.num_queued += 1

    def leave(self, tenant: str) -> None:
        """Note that a tenant has nothing queued any more; its counter stays and may grow."""
        self._accounts[tenant].is_queued = False
        self.num_queued -= 1
        self._last_left = tenant

    def charge(self, tenant: str, weight: float, amount: float) -> None:
        """Add to a tenant's service; O(1), whether it is queued or not."""
        account = self._accounts.get(tenant) or self._open(tenant)
        account.counter += amount / weight

    def first(self) -> str:
        """Return the queued tenant with the least counter; somebody must be queued."""
        heap = self._heap
        while True:
            counter, rank, tenant = heap[0]
            account = self._accounts[tenant]
            if (account.counter, account.rank) != (counter, rank):
                heapreplace(heap, (account.counter, account.rank, tenant))
            elif account.is_queued:
                return tenant
            else:  # nobody who is queued has had less: it would be lifted over this anyway
                heappop(heap)
                del self._accounts[tenant]
                self.floor = max(self.floor, account.counter)

    def _open(self, tenant: str) -> _Account:
        if len(self._accounts) - self.num_queued >= MAX_IDLE_ACCOUNTS:
            self._forget_small_debts()
        account = self._accounts[tenant] = _Account(self.floor, next(self._ranks))
        heappush(self._heap, (account.counter, account.rank, tenant))
        return account

    def _forget_small_debts(self) -> None:
        """Forget the lower half of those who are not queued, and let nobody enter below them."""
        idle = [item for item in self._accounts.items() if not item[1].is_queued]
        idle.sort(key=lambda item: item[1].counter)
        for tenant, account in idle[: len(idle) // 2]:
            del self._accounts[tenant]
            self.floor = max(self.floor, account.counter)
        self._heap = [(a.counter, a.rank, tenant) for tenant, a in self._accounts.items()]
        heapify(self._heap)

    def check_integrity(self) -> None:
        """Prove counts, and that no entry of the heap is ahead of its account."""
        assert self.num_queued == sum(a.is_queued for a in self._accounts.values())
        assert len(self._heap) == len(self._accounts)
        for counter, rank, tenant in self._heap:
            account = self._accounts[tenant]
            assert (counter, rank) <= (account.counter, account.rank), tenant
