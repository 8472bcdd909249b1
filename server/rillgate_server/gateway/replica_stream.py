"""One request's events at one replica, as a gateway reads them.

Owns what has arrived and was not read, and whether more will come. Does not know connections or
where the request goes when this stream breaks (gateway.relay does).
"""

import asyncio
from typing import Protocol

from rillgate_server.core.pending_output import PendingOutput, StepEntry, entries_of
from rillgate_server.core.request import Rejection
from rillgate_server.core.step import ChoiceFinished, ChoiceTokens, RequestFailed, RequestStarted
from rillgate_server.core.submission import Submission
from rillgate_server.errors import NoReplica


class RequestRefused(Exception):
    """The replica did not take the request on."""

    def __init__(self, rejection: Rejection) -> None:
        """Take what it said."""
        self.rejection = rejection
        super().__init__(rejection.message)


class HandedOver(Exception):
    """The request was given up here on purpose, to go on elsewhere."""

    def __init__(self, why: str, to: str) -> None:
        """Take why, and the address where it shall go on (empty: anywhere)."""
        self.to = to
        super().__init__(why)


class Carrier(Protocol):
    """What a stream needs of its link."""

    address: str

    def abort(self, stream: "ReplicaStream", choice_indices: tuple[int, ...]) -> None:
        """Tell the replica, unless the stream is over or its connection broken."""
        ...


class ReplicaStream:
    """One request's events. One task reads; `abort` and `close` may come from any task."""

    def __init__(self, link: Carrier, request_key: int, submission: Submission) -> None:
        """Made by `ReplicaLink.submit`."""
        self.request_key = request_key
        self.address = link.address
        """Of the replica."""
        self.is_started = False
        """Whether the replica said that the request runs."""
        self._link = link
        self._open_choices = {choice.index for choice in submission.choices}
        self._pending = PendingOutput()
        self._end: Exception | None = None  # what the reader gets after what waits
        self._wake = asyncio.Event()

    def __repr__(self) -> str:
        return (
            f"ReplicaStream(request_key={self.request_key}, open={sorted(self._open_choices)}, "
            f"pending={self._pending!r}, end={self._end!r})"
        )

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will arrive (something may still wait to be read)."""
        return not self._open_choices

    async def next_events(self) -> list[StepEntry]:
        """Wait for events and return all since the last call, each choice's tokens in one.

        Empty: the request is over, and everything was returned. Raises RequestRefused when it was
        not taken on, HandedOver when it shall go on elsewhere, and NoReplica when the replica was
        lost before the request's end: each after the events that had arrived.
        """
        while not self._pending:
            if self._end is not None:
                raise self._end
            if self.is_finished:
                return []
            self._wake.clear()
            await self._wake.wait()
        return list(entries_of(self._pending.take()))

    def abort(self, choice_indices: tuple[int, ...] = ()) -> None:
        """End the request, or some of its choices; never fails. Nothing more arrives for them."""
        ended = tuple(it for it in choice_indices if it in self._open_choices)
        if not self._open_choices or (choice_indices and not ended):
            return
        self._open_choices.difference_update(ended or tuple(self._open_choices))
        self._link.abort(self, ended if self._open_choices else ())
        self._wake.set()

    def close(self) -> None:
        """Abort the request unless it is over. Idempotent."""
        self.abort()

    def hand_over(self, why: str, to: str = "") -> None:
        """Give the request up here so that its reader takes it elsewhere; no-op when it is over."""
        if self._open_choices and self._end is None:
            self._end = HandedOver(why, to)
            self.abort()

    # -- by the link ------------------------------------------------------------------------------

    def add(self, step_id: int, entry: StepEntry) -> None:
        """Keep an entry of a step; the link wakes the reader once per step."""
        if isinstance(entry, ChoiceTokens | ChoiceFinished):
            if entry.choice_index not in self._open_choices:
                return  # aborted
            if isinstance(entry, ChoiceFinished):
                self._open_choices.discard(entry.choice_index)
        elif isinstance(entry, RequestFailed):
            self._open_choices.clear()
        elif isinstance(entry, RequestStarted):
            self.is_started = True
        self._pending.add(step_id, entry)

    def wake(self) -> None:
        """Let the reader see what was added."""
        self._wake.set()

    def reject(self, rejection: Rejection) -> None:
        """Note that the request was not taken on."""
        self._end = RequestRefused(rejection)
        self._open_choices.clear()
        self._wake.set()

    def break_off(self, why: str) -> None:
        """Note that the replica was lost."""
        self._end = self._end or NoReplica(why)
        self._wake.set()
