"""The choices that wait for a slot and for blocks, and which of them goes next.

Owns the order between priority classes, and charges tenants for what they get. The order inside a
class is class_queue's. Does not know limits (admission does), slots or blocks.

Lower classes wait while higher ones have something, but not for ever. A class of which something
waits and nothing was taken for `aging_s` counts as one class higher, for 2 * aging_s as two, until
one choice of it is taken; of equals the class that waits longest goes first. So whatever arrives
above it, a class has its turn at the latest c * aging_s after its last one, or after it began to
wait (c: the classes above it, each of which may be due once before it), and keeps the turn until
its head has room. An overload of high work is delayed by one choice per lower class and `aging_s`.

The rejected alternative moves each request up by its own wait. Then a tenant's flood, once older
than `aging_s`, would go before everything new in its own class, and take half of the class above:
fairness inside a class would hold only for so long. Here aging chooses the class, never the
tenant, and costs O(classes), where moving requests needs a search for those that are due.
"""

from collections.abc import Iterable

from rillgate_server.core.load import MAX_QUEUE_LOADS, QueueLoad
from rillgate_server.core.request import PriorityClass, Request
from rillgate_server.scheduler.class_queue import ClassQueue
from rillgate_server.scheduler.fairness import W_INPUT, W_KV_SECOND, W_OUTPUT
from rillgate_server.scheduler.sequence import Sequence, SequenceState


class RequestQueue:
    """Sequences in state WAITING. State: one queue per priority class."""

    def __init__(self, aging_s: float) -> None:
        """Start empty; `aging_s` as in BatcherConfig."""
        self._aging_s = aging_s
        self._classes = tuple(ClassQueue(priority) for priority in PriorityClass)

    def __repr__(self) -> str:
        return f"RequestQueue({', '.join(map(repr, self._classes))})"

    def __len__(self) -> int:
        return sum(map(len, self._classes))

    def __bool__(self) -> bool:
        return any(self._classes)

    @property
    def num_tokens(self) -> int:
        """Known tokens of all that wait; how many of them are cached shows when they start."""
        return sum(waiting.num_tokens for waiting in self._classes)

    # -- the order --------------------------------------------------------------------------------

    def push(self, sequence: Sequence, now: float) -> None:
        """Put a new, held-back or preempted sequence into its place; O(log waiting).

        A new one waits since its arrival, a preempted one since `now`.
        """
        sequence.state = SequenceState.WAITING
        self._class_of(sequence).push(sequence, now)

    def head(self, now: float) -> Sequence:
        """Return the next one; something must wait.

        O(classes) and the tenants' counters that have to be put in order, O(log tenants) each.
        """
        return self._next_class(now).head

    def pop(self, now: float) -> Sequence:
        """Take the head: the same that `head` returned at the same time, if nothing changed."""
        waiting = self._next_class(now)
        sequence = waiting.head
        waiting.take(sequence, now)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take one out, wherever it is; O(log waiting)."""
        self._class_of(sequence).remove(sequence)

    def _next_class(self, now: float) -> ClassQueue:
        return min(filter(len, self._classes), key=lambda waiting: self._rank(waiting, now))

    def _rank(self, waiting: ClassQueue, now: float) -> tuple[int, float]:
        num_steps_up = int(max(0.0, now - waiting.waits_since_s) / self._aging_s)
        return max(0, waiting.priority - num_steps_up), waiting.waits_since_s

    def _class_of(self, sequence: Sequence) -> ClassQueue:
        return self._classes[sequence.group.request.priority]

    # -- the charges ------------------------------------------------------------------------------

    def started(self, sequence: Sequence, num_tokens: int) -> None:
        """Charge the input of a choice that begins to run: the tokens to be computed for it now.

        Once: what is computed again after a preemption is not charged.
        """
        if not sequence.is_charged:
            sequence.is_charged = True
            self._charge(sequence, W_INPUT * num_tokens)

    def charge_step(
        self, sampled: Iterable[tuple[Sequence, int]], holders: Iterable[Sequence], seconds: float
    ) -> None:
        """Charge a step of `seconds`: their tokens to `sampled`, what they hold to `holders`.

        A shared block is charged to each holder: it stays because of each. O(holders).
        """
        for sequence, num_tokens in sampled:
            self._charge(sequence, W_OUTPUT * num_tokens)
        per_token = W_KV_SECOND * seconds
        for sequence in holders:
            self._charge(sequence, per_token * len(sequence.token_ids))

    def _charge(self, sequence: Sequence, amount: float) -> None:
        request = sequence.group.request
        self._classes[request.priority].charge(request.tenant, amount)

    # -- the state of things ----------------------------------------------------------------------

    def num_tokens_ahead(self, request: Request, num_tokens: int) -> int:
        """Return about how many tokens go before a new request with `num_tokens` if it is queued.

        All of higher classes, and of its own what `ClassQueue.num_tokens_ahead` says. Aging, and
        what arrives later, are left out.
        """
        higher = self._classes[: request.priority]
        own = self._classes[request.priority]
        return sum(waiting.num_tokens for waiting in higher) + own.num_tokens_ahead(
            request, num_tokens
        )

    def loads(self) -> tuple[QueueLoad, ...]:
        """Report what waits per class and tenant: the MAX_QUEUE_LOADS with the most tokens."""
        sizes = (size for waiting in self._classes for size in waiting.sizes())
        return tuple(
            QueueLoad(priority, tenant, num_requests, num_tokens)
            for num_tokens, num_requests, priority, tenant in sorted(sizes, reverse=True)[
                :MAX_QUEUE_LOADS
            ]
        )

    def check_integrity(self) -> None:
        """Prove every class's invariants."""
        for waiting in self._classes:
            waiting.check_integrity()
