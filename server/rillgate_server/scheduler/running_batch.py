"""The choices that have a slot and blocks, and how they get and lose them.

Owns slots and block tables of what runs. Does not know the queue, budgets, or what is told to
callers.

A running sequence holds the blocks of all its known tokens from its start on, so a prefill never
runs out of blocks half-way; only the next token of a decode needs more. The rejected alternative,
blocks chunk by chunk, lets two long prompts block each other half-way.
"""

from bisect import insort
from collections.abc import Iterable
from operator import attrgetter

from rillgate_server.kvcache.manager import KVCacheManager
from rillgate_server.scheduler.sequence import Sequence, SequenceState
from rillgate_server.scheduler.slots import Slots

_order = attrgetter("order")


class RunningBatch:
    """Sequences in state RUNNING, by order of arrival.

    State: the list, the slots, the cache, and ended sequences whose blocks an open plan names:

        RUNNING ──end──▶ not in the open plan: blocks and slot are free at once
                └──────▶ in the open plan: `closing`, free when its result is there
    """

    def __init__(self, cache: KVCacheManager, max_running: int) -> None:
        """Start empty."""
        self.cache = cache
        self.slots = Slots(max_running)
        self.sequences: list[Sequence] = []
        self.closing: list[Sequence] = []
        self.num_preemptions = 0

    def __repr__(self) -> str:
        return f"RunningBatch(running={len(self.sequences)}, {self.slots}, {self.cache})"

    @property
    def has_free_slot(self) -> bool:
        """Whether one more may start."""
        return self.slots.num_taken < self.slots.max_running

    def try_start(self, sequence: Sequence) -> int | None:
        """Give a sequence its slot and all its blocks; return the tokens found in the cache.

        Returns None when there are too few blocks. One block stays available for each running
        sequence: they are about to grow, and would take the newcomer's blocks away again.
        """
        num_hit_tokens = self.cache.try_start(
            sequence.table,
            sequence.token_ids,
            takes_hits=not sequence.gathers_prompt_logprobs,
            headroom_blocks=len(self.sequences),
        )
        if num_hit_tokens is None:
            return None
        sequence.num_computed = num_hit_tokens
        sequence.slot = self.slots.take()
        sequence.state = SequenceState.RUNNING
        insort(self.sequences, sequence, key=_order)
        return num_hit_tokens

    def preempt_last(self) -> Sequence:
        """Take slot and blocks from the one that arrived last, and return it.

        Its committed blocks stay in the cache while there is room, so it resumes as a prefix hit.
        """
        victim = self.sequences.pop()
        assert not victim.is_planned, victim
        self._release(victim)
        victim.num_preemptions += 1
        self.num_preemptions += 1
        return victim

    def end(self, sequence: Sequence) -> None:
        """Let a running sequence go; its blocks follow as soon as no plan names them."""
        self.sequences.remove(sequence)
        sequence.state = SequenceState.ENDED
        if sequence.is_planned:
            self.closing.append(sequence)
        else:
            self._release(sequence)

    def plan_done(self, planned: Iterable[Sequence]) -> None:
        """Free what ended while the plan was open."""
        for sequence in planned:
            sequence.is_planned = False
        for sequence in self.closing:
            self._release(sequence)
        self.closing.clear()

    def _release(self, sequence: Sequence) -> None:
        self.cache.free(sequence.table)
        self.slots.give_back(sequence.slot)
        sequence.slot = -1
        sequence.num_computed = 0

    def check_integrity(self) -> None:
        """Prove order, states, positions and blocks."""
        assert self.sequences == sorted(self.sequences, key=_order)
        for sequence in self.sequences:
            assert sequence.state is SequenceState.RUNNING, sequence
            assert 0 <= sequence.num_computed < len(sequence.token_ids), sequence
            covered = len(sequence.table.blocks) * self.cache.block_size_tokens
            assert covered >= len(sequence.token_ids) - 1, sequence
            committed = sequence.table.num_committed * self.cache.block_size_tokens
            assert committed <= sequence.num_computed, sequence
        for sequence in self.closing:
            assert sequence.state is SequenceState.ENDED, sequence
            assert sequence.is_planned, sequence
        holders = self.sequences + self.closing
        self.slots.check_integrity([sequence.slot for sequence in holders])
        self.cache.check_integrity(sequence.table for sequence in holders)
