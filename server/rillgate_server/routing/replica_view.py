"""What a gateway knows of one replica: its welcome, its load, its cached blocks, its own requests.

Owns that knowledge and what follows from it alone: whether the replica may be used, what it holds
of a chain of hashes, how much it has to do by now. Does not know connections (its owner tells it
what came and what broke), other replicas, or who is preferred.

A Load is a few hundred milliseconds old before the next one comes. What was sent meanwhile is added
to it, or a burst would all go to the replica that was idle last; and what ended meanwhile is taken
off, or the replica that is done first would get nothing new:

                      as of                     came
    ───────────────────┼──────────────────────────┼──────────────────▶ time
      in the Load      │       step_age_s         │
                       ├──── sent here: not in the Load, so added ────▶
                                                  ├─ ended here: taken off ─▶
"""

from dataclasses import dataclass

from rillgate_server.core.block_events import BlockChange, BlockEvent, CacheTier
from rillgate_server.core.load import EngineLoad
from rillgate_server.core.welcome import Welcome

LOST_AFTER_S = 1.0
"""Without a Load for this long a replica is lost (contracts, section 2)."""
LOAD_LAG_S = 0.06
"""How much older than its latest step a Load may be: the engine gathers one every 50 ms, and a few
go by on the way. A request that was sent in between counts twice for one Load, not never."""

_TIER_BITS = {CacheTier.DEVICE: 1, CacheTier.HOST: 2}


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """One request that was sent to a replica and is not over; compared by identity."""

    key: str
    """Of the replica."""
    num_choices: int
    num_tokens: int
    """That it must compute before its first token, as far as is known."""
    sent_s: float


class ReplicaView:
    """One replica as the gateway sees it.

    State: welcome (None: not connected), load (None: none came yet) and when it came; the tiers
    that hold each announced hash, and the last event's number; open tickets, those of them that
    the load does not count yet, and their sums; the choices that it counts and that have ended.
    """

    def __init__(self, key: str) -> None:
        """Know nothing but the name that the gateway gives it."""
        self.key = key
        self.welcome: Welcome | None = None
        self.load: EngineLoad | None = None
        self.last_sent_number = 0
        """The router's count when it last sent something here: who waited longest wins a tie."""
        self._heard_s = 0.0
        self._is_told_to_drain = False
        self._sequence: int | None = None  # of the last event; None: not following
        self._blocks: dict[bytes, int] = {}  # hash -> bits of the tiers that hold it
        self._open: dict[Ticket, None] = {}
        self._uncounted: dict[Ticket, None] = {}  # oldest first
        self._num_uncounted_choices = 0
        self._num_uncounted_tokens = 0
        self._num_ended_choices = 0

    def __repr__(self) -> str:
        return (
            f"ReplicaView({self.key!r}, connected={self.welcome is not None}, "
            f"open={len(self._open)}, uncounted={len(self._uncounted)}, "
            f"blocks={len(self._blocks)}, sequence={self._sequence})"
        )

    # -- what its owner heard ---------------------------------------------------------------------

    def connected(self, welcome: Welcome, now: float) -> None:
        """Begin anew with what a replica said of itself; its events are followed from 1 on."""
        self.disconnected()
        self.welcome = welcome
        self._heard_s = now
        self._sequence = 0

    def disconnected(self) -> None:
        """Forget everything; the requests that were open there are over."""
        self.welcome = None
        self.load = None
        self._is_told_to_drain = False
        self._sequence = None
        self._blocks = {}
        self._open.clear()
        self._uncounted.clear()
        self._num_uncounted_choices = self._num_uncounted_tokens = self._num_ended_choices = 0

    def told_to_drain(self) -> None:
        """Send nothing there until it connects anew, whatever its Loads say."""
        self._is_told_to_drain = True

    def heard_load(self, load: EngineLoad, now: float) -> None:
        """Take a Load that came now."""
        self.load = load
        self._heard_s = now
        self._num_ended_choices = 0
        as_of_s = now - load.step_age_s - LOAD_LAG_S
        for ticket in list(self._uncounted):
            if ticket.sent_s > as_of_s:
                break
            self._count(ticket)

    def apply(self, event: BlockEvent) -> bool:
        """Take an event of its cache; False: one is missing, and all hashes are forgotten.

        After that every event is refused until `connected` or `watched_anew`.
        """
        if self._sequence is None or event.sequence != self._sequence + 1:
            self._sequence = None
            self._blocks = {}
            return False
        self._sequence = event.sequence
        if event.change is BlockChange.CLEARED:
            self._blocks = {}
        elif event.change is BlockChange.EVICTED:
            self._remove_blocks(event)
        else:
            bit, blocks = _TIER_BITS[event.tier], self._blocks
            for block_hash in event.hashes:
                blocks[block_hash] = blocks.get(block_hash, 0) | bit
        return True

    def watched_anew(self) -> None:
        """Forget all hashes and follow a new watch's events, from 1 on."""
        self._sequence = 0
        self._blocks = {}

    def _remove_blocks(self, event: BlockEvent) -> None:
        bit, blocks = _TIER_BITS[event.tier], self._blocks
        for block_hash in event.hashes:
            left = blocks.get(block_hash, 0) & ~bit
            if left:
                blocks[block_hash] = left
            else:
                blocks.pop(block_hash, None)

    # -- this gateway's requests ------------------------------------------------------------------

    def sent(self, ticket: Ticket) -> None:
        """Count a request that goes there now."""
        self._open[ticket] = self._uncounted[ticket] = None
        self._num_uncounted_choices += ticket.num_choices
        self._num_uncounted_tokens += ticket.num_tokens

    def ended(self, ticket: Ticket) -> None:
        """Count a request no more, whatever its end. Idempotent."""
        if ticket in self._open:
            del self._open[ticket]
            if ticket not in self._uncounted:
                self._num_ended_choices += ticket.num_choices
        self._count(ticket)

    def _count(self, ticket: Ticket) -> None:
        """Leave to the load what it says of a request."""
        if ticket in self._uncounted:
            del self._uncounted[ticket]
            self._num_uncounted_choices -= ticket.num_choices
            self._num_uncounted_tokens -= ticket.num_tokens

    # -- what follows -----------------------------------------------------------------------------

    def is_usable(self, now: float) -> bool:
        """Whether requests may go there."""
        return not (self.welcome is None or self.is_draining or self.is_lost(now) or self.is_frozen)

    @property
    def is_draining(self) -> bool:
        """Whether it takes on nothing new."""
        return self._is_told_to_drain or (self.load is not None and self.load.is_draining)

    def is_lost(self, now: float) -> bool:
        """Whether it has said nothing for too long, or is not connected."""
        return self.welcome is None or now - self._heard_s > LOST_AFTER_S

    @property
    def is_frozen(self) -> bool:
        """Whether its engine makes no progress though it has work."""
        return self.load is not None and self.load.is_frozen

    @property
    def num_blocks(self) -> int:
        """Hashes that it announced and still holds, in either tier."""
        return len(self._blocks)

    def count_leading(self, hashes: list[bytes]) -> int:
        """Return how many blocks at the beginning of a chain it holds, in either tier."""
        blocks = self._blocks
        if all(map(blocks.__contains__, hashes)):  # the fast way through a long prefix
            return len(hashes)
        for i, block_hash in enumerate(hashes):
            if block_hash not in blocks:
                return i
        return len(hashes)

    @property
    def num_open(self) -> int:
        """This gateway's requests there: its connections."""
        return len(self._open)

    @property
    def num_choices(self) -> int:
        """Choices that run or wait there by now, everybody's."""
        load = self.load
        told = load.num_running + load.num_loading + load.num_waiting if load else 0
        return max(0, told - self._num_ended_choices) + self._num_uncounted_choices

    @property
    def num_tokens_to_compute(self) -> int:
        """Tokens that wait there for their prefill by now."""
        told = self.load.num_waiting_tokens if self.load else 0
        return told + self._num_uncounted_tokens

    @property
    def num_free_seats(self) -> int:
        """Choices that it could start at once."""
        return max(0, self.welcome.max_running - self.num_choices) if self.welcome else 0

    def check_integrity(self) -> None:
        """Prove that the sums are those of the tickets, and that nothing is known of nobody."""
        assert self._uncounted.keys() <= self._open.keys(), "a request is over and counted"
        assert self._num_uncounted_choices == sum(it.num_choices for it in self._uncounted)
        assert self._num_uncounted_tokens == sum(it.num_tokens for it in self._uncounted)
        assert all(ticket.key == self.key for ticket in self._open)
        assert all(0 < bits < 4 for bits in self._blocks.values())
        if self.welcome is None:
            assert self.load is None
            assert not self._open
        if self._sequence is None:
            assert not self._blocks, "hashes of a replica that is not followed"
