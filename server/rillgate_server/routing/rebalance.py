"""Which waiting requests move from a loaded replica to one that has fallen idle.

Owns that rule. Does not know how a request is moved (its owner aborts it here and submits it there)
nor where new ones go. Conservative, so that nothing goes back and forth:

* to a replica where nothing waits, and at most as many choices as it has free seats;
* the oldest first: it has waited longest, and would have been the next one here;
* never a request that came to its replica a moment ago;
* only while the receiver is no more loaded afterwards than the sender.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rillgate_server.routing.replica_view import ReplicaView

MIN_STAY_S = 1.0
"""At a replica before a request moves on: five Loads, so both ends' loads know of it."""


@dataclass(frozen=True, slots=True)
class WaitingRequest:
    """One of this gateway's requests that no replica has started."""

    request_key: str
    num_choices: int
    placed_s: float
    """When it was sent to where it waits."""


@dataclass(frozen=True, slots=True)
class Move:
    """One request that is to go elsewhere."""

    request_key: str
    from_key: str
    to_key: str


@dataclass(slots=True)
class _Seats:
    """A replica while moves are planned."""

    key: str
    max_running: int
    num_choices: int

    @property
    def num_free(self) -> int:
        return self.max_running - self.num_choices

    def load(self, num_more: int = 0) -> float:
        return (self.num_choices + num_more) / self.max_running


def plan_moves(
    views: Sequence[ReplicaView], waiting: Mapping[str, Sequence[WaitingRequest]], now: float
) -> list[Move]:
    """Return the moves that pay now.

    `waiting`: per replica, oldest first; of replicas that are not in `views` nothing moves.
    """
    receivers = [_seats(view) for view in views if _receives(view, waiting, now)]
    senders = [_seats(view) for view in views if waiting.get(view.key)]
    moves: list[Move] = []
    for sender in sorted(senders, key=_Seats.load, reverse=True):
        for request in waiting[sender.key]:
            if now - request.placed_s < MIN_STAY_S:
                break  # and all behind it came later
            receiver = _best_receiver(receivers, sender, request.num_choices)
            if receiver is None:
                break
            receiver.num_choices += request.num_choices
            sender.num_choices -= request.num_choices
            moves.append(Move(request.request_key, sender.key, receiver.key))
    return moves


def _receives(
    view: ReplicaView, waiting: Mapping[str, Sequence[WaitingRequest]], now: float
) -> bool:
    has_waiting = bool(waiting.get(view.key)) or (view.load is not None and view.load.num_waiting)
    return view.load is not None and view.is_usable(now) and not has_waiting


def _seats(view: ReplicaView) -> _Seats:
    return _Seats(view.key, view.welcome.max_running if view.welcome else 1, view.num_choices)


def _best_receiver(receivers: Sequence[_Seats], sender: _Seats, num_choices: int) -> _Seats | None:
    """Return the least loaded one with room, if it has no more than the sender then."""
    able = [
        it
        for it in receivers
        if it.num_free >= num_choices and it.load(num_choices) <= sender.load(-num_choices)
    ]
    return min(able, key=_Seats.load, default=None)
