"""One generation over one replica after another, until it is over.

Owns the order of things when a replica is lost, refuses or hands the request over: what was
generated is submitted to another one as a continuation (design, section 9), and the caller sees a
pause. How often and how long is routing.continuation's to say, where the fleet's.

    submit ── events ── over
      ▲         │
      │         ├── HandedOver (drain, an idle neighbour) ──▶ submit again
      │         ├── NoReplica (killed, hung, cut off) ──────▶ submit again, or give up
      │         └── RequestRefused ─────────────────────────▶ submit elsewhere, wait, or give up
      └── wait for a replica
"""

import asyncio

from rillgate_server.core.clock import Clock
from rillgate_server.core.request import Rejection, RejectReason
from rillgate_server.errors import EngineFailure, NoReplica, RillgateError
from rillgate_server.gateway.fleet import Fleet
from rillgate_server.gateway.generation import Generation, refusal
from rillgate_server.gateway.replica_stream import HandedOver, ReplicaStream, RequestRefused
from rillgate_server.routing.continuation import (
    Attempts,
    GiveUp,
    GiveUpReason,
    NextStep,
    TryNow,
    WaitUntil,
)

_RETRY_AFTER_S = 1.0
"""What a caller is told whose stream nobody goes on with: a replica is started again in seconds."""


class Relay:
    """Carries one generation; `run` once.

    State: the attempts so far, the latest refusal, where the next attempt is wanted, the moves.
    """

    def __init__(
        self, generation: Generation, fleet: Fleet, clock: Clock, ends_at_s: float | None
    ) -> None:
        """Begin with nothing submitted. `ends_at_s`: when the stream ends at its deadline, on the
        loop's clock."""
        self._generation = generation
        self._fleet = fleet
        self._clock = clock
        self._ends_at_s = ends_at_s
        self._attempts = Attempts(fleet.failover_wait_s, generation.num_tokens)
        self._refused: Rejection | None = None
        self._wanted = ""
        self.num_moves = 0
        """Times that it went on elsewhere."""

    def __repr__(self) -> str:
        return f"Relay({self._generation!r}, {self._attempts!r}, moves={self.num_moves})"

    async def run(self) -> None:
        """Return when the generation is over; raises what the call ends with otherwise."""
        step: NextStep = TryNow()
        while not self._generation.is_over:
            if isinstance(step, GiveUp):
                raise self._end_of(step.why)
            if isinstance(step, WaitUntil):
                await self._fleet.wait_for_replica(step.until_s - self._clock.now())
                step = TryNow()
            else:
                step = await self._try(step.excluded)

    async def _try(self, excluded: frozenset[str]) -> NextStep:
        """Submit what is left and read it to the end or to a break; say what is next."""
        submission = self._generation.submission(self._time_remaining_s())
        stream = self._fleet.submit(submission, excluded, self._wanted)
        self._wanted = ""
        if stream is None:
            return self._attempts.found_none(self._clock.now())
        try:
            await self._take_events(stream)
        except RequestRefused as error:
            self._refused = error.rejection
            return self._attempts.refused(stream.address, self._weighed(error.rejection.reason))
        except HandedOver as error:
            self._note_move()
            self._wanted = error.to
            return self._attempts.handed_over(self._clock.now(), self._generation.num_tokens)
        except NoReplica:
            self._note_move()
            return self._attempts.broke(self._clock.now(), self._generation.num_tokens)
        finally:
            self._fleet.release(stream)
        return TryNow()  # never tried: the generation is over

    async def _take_events(self, stream: ReplicaStream) -> None:
        """Hand a replica's events to the generation until it is over."""
        while not self._generation.is_over:
            events = await stream.next_events()
            if not events and not self._generation.is_over:
                raise EngineFailure("the replica ended the request, but not all of its choices")
            ended_here = self._generation.apply(events)
            if ended_here:
                stream.abort(ended_here)

    def _weighed(self, reason: RejectReason) -> RejectReason:
        """Return what a refusal means for this stream.

        One that runs is not ended for a deadline that its next token cannot make: at the deadline
        it ends with what there is.
        """
        if reason is RejectReason.DEADLINE_NEVER and self._generation.is_started:
            return RejectReason.DEADLINE_NOW
        return reason

    def _note_move(self) -> None:
        self.num_moves += 1
        self._fleet.num_moved_streams += 1
        self._refused = None
        self._generation.break_off()

    def _time_remaining_s(self) -> float | None:
        if self._ends_at_s is None:
            return None
        return max(0.0, self._ends_at_s - asyncio.get_running_loop().time())

    def _end_of(self, why: GiveUpReason) -> RillgateError:
        """Return what the caller gets."""
        if why is GiveUpReason.REFUSED and not self._generation.is_started:
            assert self._refused is not None
            return refusal(self._refused, self._time_remaining_s())
        if why is GiveUpReason.BROKE_TOO_OFTEN:
            message = "the replica was lost again and again before the next token"
        elif self._generation.is_started:
            message = "the replica was lost before the answer's end, and no other one went on"
        else:
            message = "no replica can take requests now"
        return self._generation.lost(_RETRY_AFTER_S, message)
