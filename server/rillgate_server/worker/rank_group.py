"""One rank's ties to the others: the group it computes with, the links, the watch.

Owns the order in which they are made and ended. Does not know plans (worker.rank_executor sends
them, worker.rank_loop carries them out).
"""

import json
from collections.abc import Mapping
from typing import Any

import torch

from rillgate_server.errors import ConfigError, RankLost
from rillgate_server.worker.collectives import Collectives
from rillgate_server.worker.compute_device import identity
from rillgate_server.worker.rank_link import RankLink
from rillgate_server.worker.rank_watch import OnLost, RankWatch, end_process
from rillgate_server.worker.rendezvous import JOIN_S, RankPlace, meet

_LEAVE_S = 2.0
"""For the other ranks to end once they were told; they have nothing to finish."""
_END = b""
"""Instead of a plan."""
_WORD = b"{"
"""The beginning of a word between ranks (a JSON object); plans are arrays."""


class RankGroup:
    """A rank among its peers, from `join` to `leave`.

    State: the links (to all others on rank 0, elsewhere to rank 0), the watch, the collectives.
    """

    def __init__(
        self,
        place: RankPlace,
        links: dict[int, RankLink],
        watch: RankWatch,
        collectives: Collectives,
        num_local: int,
    ) -> None:
        """Use `join`."""
        self.place = place
        self.links = links
        self.collectives = collectives
        self.num_local = num_local
        """Ranks that share this machine's memory and cores."""
        self._watch = watch

    def __repr__(self) -> str:
        """Show who this is."""
        return f"RankGroup(rank={self.place.rank}, ranks={self.place.ranks}, {self._watch})"

    @classmethod
    def join(
        cls,
        place: RankPlace,
        facts: Mapping[str, str],
        device: torch.device,
        join_s: float = JOIN_S,
    ) -> "RankGroup":
        """Meet the other ranks, which must agree on `facts`.

        From here on the loss of one is noticed, and ends the process unless `call_on_loss` says
        otherwise. Raises ConfigError, or RankLost for one that vanished meanwhile.
        """
        met = meet(place, facts, identity(device), join_s)
        watch = RankWatch(met.beats, end_process)
        watch.start()
        collectives = Collectives(met.store, place.rank, place.ranks, device, met.own_address)
        return cls(place, met.links, watch, collectives, met.num_local)

    def call_on_loss(self, on_lost: OnLost) -> None:
        """Call back, from another thread, instead of ending the process when a rank is lost."""

        def tell(error: RankLost) -> None:
            for link in self.links.values():
                link.shut()  # whoever waits for a report
            on_lost(error)

        self._watch.call_on_loss(tell)

    def tell(self, values: Mapping[str, object]) -> None:
        """Say something to all that are linked."""
        for link in self.links.values():
            link.send(json.dumps(values).encode())

    def hear(self) -> list[dict[str, Any]]:
        """Return what each that is linked says, in the order of ranks; JSON's own values.

        Raises ConfigError when one refuses to go on.
        """
        answers = [json.loads(self.links[rank].receive()) for rank in sorted(self.links)]
        refusals = [answer["refused"] for answer in answers if "refused" in answer]
        if refusals:
            raise ConfigError(refusals[0])
        return answers

    def next_plan(self) -> bytes | None:
        """Wait for rank 0's next plan; None: it is time to end. On the other ranks.

        Raises RankLost, or ConfigError when rank 0 cannot start after all.
        """
        (link,) = self.links.values()
        data = link.receive()
        if data.startswith(_WORD):
            raise ConfigError(json.loads(data)["refused"])
        return data or None

    def refuse(self, reason: str) -> None:
        """Tell the linked ranks why this one cannot start; they end, too."""
        rank = self.place.rank
        try:
            self.tell({"refused": f"rank {rank} cannot start: {reason}"})
        except RankLost:
            return  # they have ended already

    def leave(self) -> None:
        """End the group in good order: rank 0 tells the others to end, and waits until they have.

        Raises RankLost when one was gone before.
        """
        self._watch.stop()
        if self.place.rank == 0:
            for link in self.links.values():
                link.send(_END)
        self.collectives.close()
        for link in self.links.values():
            if self.place.rank == 0:
                link.wait_closed(_LEAVE_S)
            link.close()
        self._watch.close()
