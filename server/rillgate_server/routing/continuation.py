"""When a broken or refused stream is tried again, where not, and when it is given up.

Owns the rules of failover for one stream. Does not know streams, replicas' states or tasks: its
caller drives it with what happened, and does what it answers.

    TryNow(excluded) ─▶ choose ──┬── a replica ──▶ submit ──┬── the end
         ▲                       │                          ├── started ──▶ started()
         │                       │                          ├── broke ────▶ broke()
         │ a replica came back,  └── none ──▶ found_none()  └── refused ──▶ refused()
         │ or the time came                        │
         └── WaitUntil(until_s) ◀──────────────────┤
                                                   └──▶ GiveUp(why)
"""

from dataclasses import dataclass
from enum import Enum

from rillgate_server.core.request import RejectReason

MAX_BREAKS = 3
"""In a row, without a new token in between: a request that kills its replica kills so many, not
all. One or two can be bad luck."""
FIRST_RETRY_S, LONGEST_RETRY_S = 0.1, 2.0
"""Between two tries of a started stream that no replica has room for; each wait is twice the last.
From a few steps of a running batch up to what a short answer takes."""

_FINAL = (RejectReason.INVALID, RejectReason.TOO_LONG, RejectReason.DEADLINE_NEVER)
"""Any other replica would say the same."""


@dataclass(frozen=True, slots=True)
class TryNow:
    """Choose a replica and submit."""

    excluded: frozenset[str] = frozenset()
    """Replicas that have just refused."""


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Wait for a change in what is usable, but no longer than this; then try anew (`TryNow()`)."""

    until_s: float


class GiveUpReason(Enum):
    """Why a stream ends without its answer."""

    REFUSED = "refused"
    """By the last refusal."""
    NO_REPLICA = "no_replica"
    """For as long as it may wait."""
    BROKE_TOO_OFTEN = "broke_too_often"
    """Without a new token in between."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the stream."""

    why: GiveUpReason


NextStep = TryNow | WaitUntil | GiveUp


class Attempts:
    """The tries of one stream.

    State: tokens and breaks since the last progress; whether it ever started; when the wait began
    and how long the next pause is; who refused since the last wait, and whether for its load.
    """

    def __init__(self, failover_wait_s: float, num_tokens: int = 0) -> None:
        """Start before the first try. `num_tokens`: that a continuation brought."""
        self._failover_wait_s = failover_wait_s
        self._num_tokens = num_tokens
        self._num_breaks = 0
        self._has_started = num_tokens > 0
        self._waiting_since_s: float | None = None
        self._retry_s = FIRST_RETRY_S
        self._refused_by: frozenset[str] = frozenset()
        self._is_refused_for_load = False

    def __repr__(self) -> str:
        return (
            f"Attempts(tokens={self._num_tokens}, breaks={self._num_breaks}, "
            f"waiting_since={self._waiting_since_s}, refused_by={sorted(self._refused_by)})"
        )

    def started(self) -> None:
        """Say that a replica began with it: the wait is over."""
        self._has_started = True
        self._end_wait()

    def broke(self, now: float, num_tokens: int) -> NextStep:
        """Say that the replica was lost. `num_tokens`: of all choices, that the caller has now."""
        self._note_progress(num_tokens)
        self._num_breaks += 1
        self._has_started = True  # or it may have: who is killed by a request says nothing of it
        self._end_wait()
        self._waiting_since_s = now
        if self._num_breaks >= MAX_BREAKS:
            return GiveUp(GiveUpReason.BROKE_TOO_OFTEN)
        return TryNow()

    def handed_over(self, now: float, num_tokens: int) -> NextStep:
        """Say that it was taken from its replica on purpose: nobody's fault, and it may wait."""
        self._note_progress(num_tokens)
        self._has_started = True  # to others it is as good as started: it had a place
        self._end_wait()
        self._waiting_since_s = now
        return TryNow()

    def refused(self, key: str, reason: RejectReason) -> NextStep:
        """Say that replica `key` did not take it on."""
        if reason in _FINAL:
            return GiveUp(GiveUpReason.REFUSED)
        self._refused_by |= {key}
        if reason is not RejectReason.DRAINING:
            if self._is_refused_for_load and not self._has_started:
                return GiveUp(GiveUpReason.REFUSED)  # one other was tried
            self._is_refused_for_load = True
        return TryNow(self._refused_by)

    def found_none(self, now: float) -> NextStep:
        """Say that no replica can be tried now, apart from those that were excluded.

        A stream that has started waits; one that has not is answered at once: it can go elsewhere.
        """
        is_refused, self._refused_by = bool(self._refused_by), frozenset()
        if not self._has_started:
            return GiveUp(GiveUpReason.REFUSED if is_refused else GiveUpReason.NO_REPLICA)
        if self._waiting_since_s is None:
            self._waiting_since_s = now
        end_s = self._waiting_since_s + self._failover_wait_s
        if now >= end_s:
            return GiveUp(GiveUpReason.REFUSED if is_refused else GiveUpReason.NO_REPLICA)
        if not is_refused:
            return WaitUntil(end_s)
        retry_s, self._retry_s = self._retry_s, min(2 * self._retry_s, LONGEST_RETRY_S)
        return WaitUntil(min(now + retry_s, end_s))

    def _note_progress(self, num_tokens: int) -> None:
        if num_tokens > self._num_tokens:
            self._num_breaks = 0
        self._num_tokens = num_tokens

    def _end_wait(self) -> None:
        self._waiting_since_s = None
        self._retry_s = FIRST_RETRY_S
        self._refused_by = frozenset()
        self._is_refused_for_load = False
