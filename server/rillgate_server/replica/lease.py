"""Leases: a worker that was cut off has ended what it ran before its replacement starts.

The rules of both ends, over injected clocks that have nothing to do with each other (Gray and
Cheriton, "Leases", SOSP 1989). What a lease keeps alive, and how renewals travel, is others'
business.

    worker's clock   ──r──────────────────────────────r + duration: over, for good──▶
                       \\ answer r          / renewal of r, however late it arrives
    grantor's clock  ───a─────────s────────────────────s + duration + margin: fenced──▶

A renewal names a reading `r` of the worker's own clock that an earlier answer brought. The worker
counts from `r`, not from the renewal's arrival: one that a broken network held up for an hour gives
nothing. As `r` was read before the answer came, and the renewal sent after that (a <= s), the lease
is over no later than `s + duration`, wherever the renewal is by then.
"""

from rillgate_server.core.clock import Clock

MARGIN_S = 1.0
"""Beyond the lease's end: for the kill to take effect, and for clocks that run apart (by 0.01 %
at worst, which is 0.5 ms in 5 s)."""
RENEWALS_PER_LEASE = 5
"""So that one or two may be lost."""


class WorkerLease:
    """The worker's end; the caller serialises calls. State: until when it holds."""

    def __init__(self, duration_s: float, clock: Clock) -> None:
        """Begin a lease now."""
        self._duration_s = duration_s
        self._clock = clock
        self._until_s = clock.now() + duration_s

    def __repr__(self) -> str:
        return f"WorkerLease(until {self._until_s:.3f} s)"

    def remaining_s(self) -> float:
        """Return how long it still holds; 0: it is over, and no renewal can change that."""
        return max(0.0, self._until_s - self._clock.now())

    def renew(self, reading_s: float) -> float | None:
        """Take a renewal of `reading_s`; return the next reading, None when the lease is over."""
        if self.remaining_s() == 0.0:
            return None
        now_s = self._clock.now()
        self._until_s = max(self._until_s, min(reading_s, now_s) + self._duration_s)
        return now_s


class LeaseGrant:
    """The grantor's end, for one worker; made when the worker's first answer has come.

    State: the worker's last reading, when that came, and when the last renewal was sent.
    """

    def __init__(self, duration_s: float, clock: Clock, reading_s: float) -> None:
        """Take the reading of the answer that said the lease has begun."""
        self._duration_s = duration_s
        self._clock = clock
        self._reading_s = reading_s  # the worker's clock
        self._answered_s = self._sent_s = clock.now()
        self._has_ended = False

    def __repr__(self) -> str:
        return f"LeaseGrant(answered at {self._answered_s:.3f} s, sent at {self._sent_s:.3f} s)"

    @property
    def renew_every_s(self) -> float:
        """How often to send one."""
        return self._duration_s / RENEWALS_PER_LEASE

    @property
    def patience_s(self) -> float:
        """Return how long an answer may still take; 0: the worker is lost."""
        return max(0.0, self._answered_s + self._duration_s - self._clock.now())

    @property
    def fenced_at_s(self) -> float:
        """Return when a replacement may start at the earliest."""
        return 0.0 if self._has_ended else self._sent_s + self._duration_s + MARGIN_S

    def send(self) -> float:
        """Return the reading that a renewal must name; it counts as sent from now on."""
        self._sent_s = self._clock.now()
        return self._reading_s

    def note_answer(self, reading_s: float) -> None:
        """Take the reading that an answer brought."""
        self._reading_s = reading_s
        self._answered_s = self._clock.now()

    def note_end(self) -> None:
        """The worker itself said that what it ran has ended: nothing is left to wait for."""
        self._has_ended = True
