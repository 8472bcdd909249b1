"""What is known of one replica: its cache, its load and what was sent since."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rillgate_server.core.block_events import BlockChange, BlockEvent, CacheTier
from rillgate_server.core.load import EngineLoad
from rillgate_server.routing.replica_view import LOAD_LAG_S, ReplicaView, Ticket
from rillgate_server.routing.router import Router, RouteRequest
from tests.support.routing import IDLE, WELCOME

DEVICE, HOST = CacheTier.DEVICE, CacheTier.HOST
SNAPSHOT, STORED = BlockChange.SNAPSHOT, BlockChange.STORED
EVICTED, CLEARED = BlockChange.EVICTED, BlockChange.CLEARED
HASHES = [bytes([i] * 16) for i in range(6)]


def connected() -> ReplicaView:
    """Return a view that is connected at second 100."""
    view = ReplicaView("a")
    view.connected(WELCOME, 100.0)
    return view


# -- the cache ------------------------------------------------------------------------------------


def test_a_block_counts_while_either_tier_holds_it() -> None:
    """It is gone with the last tier."""
    view = connected()
    assert view.apply(BlockEvent(1, SNAPSHOT, DEVICE, tuple(HASHES[:2]), is_last=False))
    assert view.apply(BlockEvent(2, SNAPSHOT, HOST, tuple(HASHES[1:3])))
    assert view.count_leading(HASHES) == 3
    assert view.apply(BlockEvent(3, EVICTED, DEVICE, (HASHES[1],)))
    assert view.count_leading(HASHES) == 3, "the host tier has it"
    assert view.apply(BlockEvent(4, EVICTED, HOST, (HASHES[1], HASHES[5])))
    assert view.count_leading(HASHES) == 1, "what follows a missing block cannot be used"
    assert view.apply(BlockEvent(5, STORED, DEVICE, (HASHES[1],)))
    assert view.count_leading(HASHES) == 3
    assert view.apply(BlockEvent(6, CLEARED))
    assert view.num_blocks == 0


@pytest.mark.parametrize("sequence", [1, 3, 4])
def test_a_gap_forgets_all_hashes_until_the_watch_begins_anew(sequence: int) -> None:
    """A repeated event is as bad as a missing one; later events say nothing without a snapshot."""
    view = connected()
    assert view.apply(BlockEvent(1, SNAPSHOT, DEVICE, tuple(HASHES)))
    assert not view.apply(BlockEvent(sequence, STORED))
    assert view.num_blocks == 0
    assert not view.apply(BlockEvent(2, STORED, DEVICE, tuple(HASHES)))
    assert view.is_usable(100.0), "it can serve all the same"
    view.watched_anew()
    assert view.apply(BlockEvent(1, SNAPSHOT, DEVICE, tuple(HASHES)))
    assert view.num_blocks == 6


def test_a_new_connection_begins_with_an_empty_cache() -> None:
    """Its blocks, its load and the requests there are those of another incarnation."""
    view = connected()
    view.apply(BlockEvent(1, SNAPSHOT, DEVICE, tuple(HASHES)))
    view.heard_load(replace(IDLE, num_running=5, is_draining=True), 100.0)
    view.told_to_drain()
    view.sent(Ticket("a", 1, 10, 100.0))
    view.connected(replace(WELCOME, incarnation=2), 105.0)
    assert (view.num_blocks, view.num_choices, view.num_open) == (0, 0, 0)
    assert view.is_usable(105.0)
    assert view.apply(BlockEvent(1, SNAPSHOT, DEVICE, ()))


# -- whether it may be used -----------------------------------------------------------------------


def test_it_is_lost_a_second_after_the_last_word() -> None:
    """Its welcome is a word, and so is each Load; disconnected, it is lost at once."""
    view = connected()
    assert view.is_usable(101.0)
    assert view.is_lost(101.1)
    view.heard_load(IDLE, 101.2)
    assert view.is_usable(102.1)
    view.disconnected()
    assert view.is_lost(102.1)


@pytest.mark.parametrize(
    ("longest_step_s", "step_age_s", "is_frozen"),
    [
        (0.01, 4.9, False),
        (0.01, 5.1, True),
        (2.0, 19.9, False),
        (2.0, 20.1, True),
        (0.0, 59.0, False),
        (0.0, 61.0, True),
    ],
)
def test_it_is_frozen_by_the_length_of_its_steps(
    longest_step_s: float, step_age_s: float, is_frozen: bool
) -> None:
    """After five seconds, or ten predicted steps, or a minute while nothing is predicted."""
    view = connected()
    view.heard_load(EngineLoad(longest_step_s=longest_step_s, step_age_s=step_age_s), 100.0)
    assert view.is_frozen == is_frozen
    assert view.is_usable(100.0) != is_frozen


# -- what was sent since the last Load ------------------------------------------------------------


def test_what_ended_since_the_load_counts_no_more() -> None:
    """Or a replica that is done would look busy until its next Load, and get nothing new."""
    view = connected()
    told_of, new = Ticket("a", 2, 10, 100.0), Ticket("a", 1, 10, 100.3)
    view.sent(told_of)
    view.heard_load(replace(IDLE, num_running=5), 100.2)
    view.sent(new)
    assert view.num_choices == 6
    view.ended(new)
    view.ended(new)
    assert view.num_choices == 5, "the Load did not count it"
    view.ended(told_of)
    view.ended(told_of)
    assert view.num_choices == 3, "the others are somebody else's"
    view.heard_load(replace(IDLE, num_running=3), 100.4)
    assert view.num_choices == 3, "the next Load knows"


def test_what_was_sent_counts_until_a_load_can_know_of_it() -> None:
    """A Load tells of the time of its latest step: what came during the step is not in it."""
    view = connected()
    for sent_s in (100.0, 100.5):
        view.sent(Ticket("a", 2, 50, sent_s))
    assert (view.num_choices, view.num_tokens_to_compute, view.num_free_seats) == (4, 100, 4)
    view.heard_load(EngineLoad(num_running=2, step_age_s=0.7), 100.6)
    assert view.num_choices == 6, "both came after that step, so neither is in the Load"
    view.heard_load(EngineLoad(num_running=2, step_age_s=0.2), 100.6)
    assert view.num_choices == 4, "the first is in the Load, the second is not"
    assert view.num_open == 2
    view.heard_load(EngineLoad(num_running=4), 100.5 + LOAD_LAG_S)
    assert (view.num_choices, view.num_tokens_to_compute) == (4, 0)


# -- any order of events --------------------------------------------------------------------------


class Traces(RuleBasedStateMachine):
    """Random events of two replicas and of requests, against a model of the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.router = Router("prefix")
        self.sequences = {"a": 0, "b": 0}
        self.held: dict[str, set[tuple[CacheTier, bytes]]] = {"a": set(), "b": set()}
        self.tickets: list[Ticket] = []
        for key in "ab":
            self.router.add(key)
            self.connect(key)

    def view(self, key: str) -> ReplicaView:
        """Return one of the two."""
        view = self.router.get(key)
        assert view is not None
        return view

    @rule(key=st.sampled_from("ab"))
    def connect(self, key: str) -> None:
        """A replica starts anew."""
        self.view(key).connected(WELCOME, self.now)
        self.sequences[key] = 0
        self.held[key] = set()

    @rule(key=st.sampled_from("ab"))
    def disconnect(self, key: str) -> None:
        """A replica goes."""
        self.view(key).disconnected()
        self.sequences[key] = -1
        self.held[key] = set()

    @rule(key=st.sampled_from("ab"))
    def watch(self, key: str) -> None:
        """The gateway watches again, if it is connected."""
        if self.view(key).welcome is not None:
            self.view(key).watched_anew()
            self.sequences[key] = 0
            self.held[key] = set()

    @rule(
        key=st.sampled_from("ab"),
        change=st.sampled_from(BlockChange),
        tier=st.sampled_from(CacheTier),
        hashes=st.lists(st.sampled_from(HASHES), max_size=4),
        is_lost=st.booleans(),
    )
    def announce(
        self, key: str, change: BlockChange, tier: CacheTier, hashes: list[bytes], is_lost: bool
    ) -> None:
        """An event comes, or the one after it."""
        sequence = self.sequences[key]
        is_next = sequence >= 0 and not is_lost
        event = BlockEvent(max(sequence, 0) + 1 + is_lost, change, tier, tuple(hashes))
        assert self.view(key).apply(event) == is_next
        named = {(tier, block_hash) for block_hash in hashes}
        self.sequences[key] = sequence + 1 if is_next else -1
        if not is_next or change is CLEARED:
            self.held[key] = set()
        elif change is EVICTED:
            self.held[key] -= named
        else:
            self.held[key] |= named

    @rule(key=st.sampled_from("ab"), age_s=st.floats(0, 0.3), num_running=st.integers(0, 9))
    def load(self, key: str, age_s: float, num_running: int) -> None:
        """A Load comes."""
        if self.view(key).welcome is not None:
            load = EngineLoad(num_running=num_running, step_age_s=age_s)
            self.view(key).heard_load(load, self.now)

    @rule(num_tokens=st.integers(1, 30), excluded=st.sampled_from(["", "a", "b"]))
    def send(self, num_tokens: int, excluded: str) -> None:
        """A request goes where it should, which is somewhere usable, if there is such."""
        request = RouteRequest(tuple(range(num_tokens)))
        usable = {it.key for it in self.router.views if it.is_usable(self.now)} - {excluded}
        placement = self.router.choose(request, self.now, frozenset([excluded]))
        assert (placement is not None) == bool(usable)
        if placement is not None:
            assert placement.key in usable
            self.tickets.append(self.router.sent(placement, request, self.now))

    @rule(number=st.integers(0, 100))
    def end(self, number: int) -> None:
        """A request ends, perhaps for the second time."""
        if self.tickets:
            self.router.ended(self.tickets[number % len(self.tickets)])

    @rule(seconds=st.floats(0, 0.7))
    def wait(self, seconds: float) -> None:
        """Time goes by."""
        self.now += seconds

    @invariant()
    def is_sound(self) -> None:
        """The views' sums hold, and hashes are those that were announced."""
        self.router.check_integrity()
        for key, held in self.held.items():
            known = {
                block_hash for block_hash in HASHES if self.view(key).count_leading([block_hash])
            }
            assert known == {block_hash for _, block_hash in held}


Traces.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTraces = Traces.TestCase
