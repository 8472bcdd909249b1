"""A replica of the simulation: continuous batching, chunked prefill, a prefix cache; no model.

Owns one node's queue, batch, blocks and clock of steps, and says of itself what a replica would:
its load and its cache's events. Simpler than the real scheduler, so that minutes of eight nodes
take seconds: a request holds the blocks of its whole answer from its start on, cached blocks are
copies beside those, and one tier is all.
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.replicas.traffic import SimRequest
from rillgate_server.core.block_events import MAX_EVENT_HASHES, BlockChange, BlockEvent
from rillgate_server.core.load import EngineLoad, FittedCosts, TierLoad

BLOCK_SIZE_TOKENS = 16
STEP_S, PREFILL_TOKEN_S, ROW_S = 0.010, 1e-4, 1e-4
"""Of a node of speed 1, as on a GPU: a step, each prefilled token, each decoding row."""
MAX_PREFILL_TOKENS = 512
"""Per step."""


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One machine."""

    key: str
    speed: float
    num_blocks: int
    max_running: int
    background_cpu: float
    """Share of its processors that other programs take, 0 to 1."""
    fit_error: float = 1.0
    """Its fitted costs over its true ones."""


@dataclass(slots=True)
class _Row:
    """One request in the batch."""

    request: SimRequest
    num_blocks: int
    num_to_prefill: int
    end_step: int = 0
    """The step with its last token; once its prefill is computed."""


class Node:
    """One simulated replica.

    State: waiting and running requests, blocks in use, the cached hashes (least recently used
    first), the number of steps and when the last one ended, events that nobody took yet.
    """

    def __init__(self, spec: NodeSpec) -> None:
        """Start idle and empty."""
        self.spec = spec
        self.num_sent_tokens = 0
        """Prompt tokens of started requests."""
        self.num_hit_tokens = 0
        self.busy_s = 0.0
        self._waiting: deque[SimRequest] = deque()
        self._prefilling: deque[_Row] = deque()
        self._decoding: list[tuple[int, int, _Row]] = []  # heap of (end step, number, row)
        self._num_used_blocks = 0
        self._cached: OrderedDict[bytes, None] = OrderedDict()
        self._num_steps = 0
        self._num_rows_started = 0
        self._last_step_s = 0.0
        self._sequence = 0
        self._events: list[BlockEvent] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._waiting or self._prefilling or self._decoding)

    def add(self, request: SimRequest, now: float) -> None:
        """Queue a request."""
        if not self.has_work:
            self._last_step_s = now
        self._waiting.append(request)

    def remove(self, request: SimRequest) -> bool:
        """Take a request that waits out of the queue; False: it has started."""
        if request not in self._waiting:
            return False
        self._waiting.remove(request)
        return True

    # -- a step -----------------------------------------------------------------------------------

    def begin_step(self) -> float:
        """Admit what fits and return the seconds of the step that begins."""
        self._admit()
        budget, seconds = MAX_PREFILL_TOKENS, STEP_S + ROW_S * len(self._decoding)
        for row in self._prefilling:
            num_tokens = min(budget, row.num_to_prefill)
            row.num_to_prefill -= num_tokens
            budget -= num_tokens
        seconds += (MAX_PREFILL_TOKENS - budget) * PREFILL_TOKEN_S
        return seconds / self.spec.speed

    def end_step(self, began_s: float, now: float) -> tuple[list[SimRequest], list[SimRequest]]:
        """Return the requests whose first token came, and those whose last one did."""
        self._num_steps += 1
        self._last_step_s = now
        self.busy_s += now - began_s
        first: list[SimRequest] = []
        while self._prefilling and self._prefilling[0].num_to_prefill == 0:
            row = self._prefilling.popleft()
            row.end_step = self._num_steps + row.request.num_output_tokens - 1
            first.append(row.request)
            self._store(row.request.prompt_hashes)
            heapq.heappush(self._decoding, (row.end_step, self._num_rows_started, row))
            self._num_rows_started += 1
        last: list[SimRequest] = []
        while self._decoding and self._decoding[0][0] <= self._num_steps:
            row = heapq.heappop(self._decoding)[2]
            self._num_used_blocks -= row.num_blocks
            self._store(row.request.all_hashes)
            last.append(row.request)
        return first, last

    def _admit(self) -> None:
        while self._waiting:
            request = self._waiting[0]
            num_blocks = -(-request.num_all_tokens // BLOCK_SIZE_TOKENS)
            num_running = len(self._prefilling) + len(self._decoding)
            has_room = self._num_used_blocks + num_blocks <= self.spec.num_blocks
            if num_running >= self.spec.max_running or not has_room:
                return
            self._waiting.popleft()
            num_hit = self._hit(request.prompt_hashes)
            self._num_used_blocks += num_blocks
            self._evict()
            self.num_sent_tokens += len(request.prompt)
            self.num_hit_tokens += num_hit
            request.num_hit_tokens = num_hit
            self._prefilling.append(_Row(request, num_blocks, len(request.prompt) - num_hit))

    # -- the cache --------------------------------------------------------------------------------

    def _hit(self, hashes: list[bytes]) -> int:
        num_blocks = 0
        for block_hash in hashes:
            if block_hash not in self._cached:
                break
            num_blocks += 1
        for block_hash in reversed(hashes[:num_blocks]):  # the beginning is evicted last
            self._cached.move_to_end(block_hash)
        return num_blocks * BLOCK_SIZE_TOKENS

    def _store(self, hashes: list[bytes]) -> None:
        new = [block_hash for block_hash in hashes if block_hash not in self._cached]
        for block_hash in reversed(hashes):
            self._cached[block_hash] = None
            self._cached.move_to_end(block_hash)
        self._say(BlockChange.STORED, new)
        self._evict()

    def _evict(self) -> None:
        gone = []
        while self._cached and len(self._cached) + self._num_used_blocks > self.spec.num_blocks:
            gone.append(self._cached.popitem(last=False)[0])
        self._say(BlockChange.EVICTED, gone)

    def _say(self, change: BlockChange, hashes: list[bytes]) -> None:
        for first in range(0, len(hashes), MAX_EVENT_HASHES):
            self._sequence += 1
            named = tuple(hashes[first : first + MAX_EVENT_HASHES])
            self._events.append(BlockEvent(self._sequence, change, hashes=named))

    # -- what it says of itself -------------------------------------------------------------------

    def take_events(self) -> Iterator[BlockEvent]:
        """Return the cache's events since the last call."""
        events, self._events = self._events, []
        return iter(events)

    def load(self, now: float, busy_fraction: float) -> EngineLoad:
        """Say what a Load would say."""
        spec, error = self.spec, self.spec.fit_error / self.spec.speed
        return EngineLoad(
            step_age_s=now - self._last_step_s if self.has_work else 0.0,
            num_running=len(self._prefilling) + len(self._decoding),
            num_waiting=len(self._waiting),
            num_waiting_tokens=sum(len(it.prompt) for it in self._waiting)
            + sum(row.num_to_prefill for row in self._prefilling),
            device=TierLoad(num_blocks=spec.num_blocks),
            costs=FittedCosts(
                step_s=STEP_S * error,
                prefill_token_s=PREFILL_TOKEN_S * error,
                decode_row_s=ROW_S * error,
            ),
            longest_step_s=0.1,
            free_device_fraction=1 - self._num_used_blocks / spec.num_blocks,
            free_cpu_fraction=max(0.0, 1 - spec.background_cpu - 0.3 * busy_fraction),
        )

    @property
    def used_fraction(self) -> float:
        """Share of its blocks that requests hold."""
        return self._num_used_blocks / self.spec.num_blocks

    @property
    def backlog_s(self) -> float:
        """Seconds until it has done what it has, at a full batch's speed: its true load."""
        rows = [row for _, _, row in self._decoding]
        num_decode = sum(row.end_step - self._num_steps for row in rows)
        waiting = [*self._waiting, *(row.request for row in self._prefilling)]
        num_decode += sum(request.num_output_tokens for request in waiting)
        num_prefill = sum(len(request.prompt) for request in self._waiting)
        num_prefill += sum(row.num_to_prefill for row in self._prefilling)
        per_token_s = STEP_S / self.spec.max_running + ROW_S
        return (num_prefill * PREFILL_TOKEN_S + num_decode * per_token_s) / self.spec.speed
