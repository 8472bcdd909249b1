"""The choices that have a slot and blocks, and how they get and lose them.

Owns slots and block tables of what runs or loads. Does not know the queue, budgets, or what is
told to callers.

A running sequence holds the blocks of all its known tokens from its start on, so a prefill never
runs out of blocks half-way; only the next token of a decode needs more. The rejected alternative,
blocks chunk by chunk, lets two long prompts block each other half-way.
"""

from bisect import insort
from collections.abc import Iterable

from rillgate_server.core.step import RowPlan
from rillgate_server.kvcache.manager import KVCacheManager
from rillgate_server.scheduler.sequence import Sequence, SequenceState
from rillgate_server.scheduler.slots import Slots

DECODE_DELAY_WEIGHT = 0.3
"""Of a delay to a running stream, against one to a first token. Of 0, 0.3 and 1 it gave the least
time to the first token in simulated conversations over buses of 10 MB/s to 4 GB/s."""


class RunningBatch:
    """Sequences in state RUNNING or LOADING, those of higher classes and of earlier arrival first.

    State: the two lists, the slots, the cache, and ended sequences whose blocks open plans name:

        LOADING ──its copies ended──▶ RUNNING ──end──▶ in no open plan: blocks and slot are free
                                                       at once
                                              └──────▶ in an open plan: `closing`, free when the
                                                       last plan that names it is done
    """

    def __init__(self, cache: KVCacheManager, max_running: int) -> None:
        """Start empty."""
        self.cache = cache
        self.slots = Slots(max_running)
        self.sequences: list[Sequence] = []
        self.loading: list[Sequence] = []
        self.closing: list[Sequence] = []
        self.num_preemptions = 0

    def __repr__(self) -> str:
        return (
            f"RunningBatch(running={len(self.sequences)}, loading={len(self.loading)}, "
            f"{self.slots}, {self.cache})"
        )

    @property
    def has_free_slot(self) -> bool:
        """Whether one more may start."""
        return self.slots.num_taken < self.slots.max_running

    # -- starting ---------------------------------------------------------------------------------

    def try_start(self, sequence: Sequence, num_waiting: int = 0) -> bool:
        """Give a sequence its slot and all its blocks. `num_waiting`: choices in the queue.

        It is RUNNING, or LOADING until all its blocks are there. Returns False when there are too
        few blocks. One block stays available for each sequence that is here: they are about to
        grow, and would take the newcomer's blocks away again.
        """
        started = self.cache.try_start(
            sequence.table,
            sequence.token_ids,
            takes_hits=not sequence.gathers_prompt_logprobs,
            headroom_blocks=len(self.sequences) + len(self.loading),
            num_delayed=num_waiting + self._num_delayed_here(),
        )
        if started is None:
            return False
        sequence.begin_at(started.num_hit_tokens)
        sequence.num_host_tokens = started.num_host_tokens
        sequence.slot = self.slots.take()
        if sequence.table.pending_copies:
            sequence.state = SequenceState.LOADING
            self.loading.append(sequence)
        else:
            self._run(sequence)
        return True

    def _num_delayed_here(self) -> float:
        """Count those whom a newcomer's prefill delays."""
        num_prefills = sum(sequence.num_remaining > 1 for sequence in self.sequences)
        num_decodes = len(self.sequences) - num_prefills
        return num_prefills + DECODE_DELAY_WEIGHT * num_decodes

    def take_broken(self) -> list[Sequence]:
        """Take those whose load failed; they hold nothing any more, and must start anew."""
        broken = [sequence for sequence in self.loading if sequence.table.is_broken]
        for sequence in broken:
            self.loading.remove(sequence)
            self._release(sequence)
        return broken

    def run_loaded(self) -> Sequence | None:
        """Let one run whose blocks are there, the first that began to load; None: there is none."""
        for sequence in self.loading:
            if not sequence.table.pending_copies:
                self.loading.remove(sequence)
                self._run(sequence)
                return sequence
        return None

    def _run(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.RUNNING
        insort(self.sequences, sequence, key=_rank)

    # -- ending -----------------------------------------------------------------------------------

    def preempt_behind(self, position: int) -> Sequence:
        """Take slot and blocks from a running sequence at `position` or later; return it.

        Of the lowest class there it is the one that costs least to bring back; of equals the last.
        Its full blocks stay in the cache while there is room, or go to the host tier, so it
        resumes as a prefix hit. The one at `position` itself goes only when it is the last.
        """
        candidates = self.sequences[position + 1 :] or self.sequences[position:]
        lowest = candidates[-1].group.request.priority
        restart_s = self.cache.restart_s
        victim = min(
            (s for s in reversed(candidates) if s.group.request.priority == lowest),
            key=lambda s: restart_s(s.table, s.num_computed),
        )
        assert not victim.num_plans, victim  # nothing is taken from whom an open plan names
        self.sequences.remove(victim)
        is_swap = self.cache.choose_swap(victim.table, victim.num_computed)
        self._release(victim, is_saved_later=is_swap)
        victim.num_preemptions += 1
        self.num_preemptions += 1
        return victim

    def end(self, sequence: Sequence) -> None:
        """Let a running or loading sequence go; its blocks follow when no plan names them."""
        (self.loading if sequence.state is SequenceState.LOADING else self.sequences).remove(
            sequence
        )
        sequence.state = SequenceState.ENDED
        if sequence.num_plans:
            self.closing.append(sequence)
        else:
            self._release(sequence)

    def plan_done(self, planned: Iterable[tuple[RowPlan, Sequence]]) -> None:
        """Free what ended while the plan, the oldest one, was open, and is in no later one."""
        for row, sequence in planned:
            sequence.row_done(row)
        closing, self.closing = self.closing, []
        for sequence in closing:
            if sequence.num_plans:
                self.closing.append(sequence)
            else:
                self._release(sequence)

    def _release(self, sequence: Sequence, *, is_saved_later: bool = True) -> None:
        self.cache.free(sequence.table, is_saved_later=is_saved_later)
        self.slots.give_back(sequence.slot)
        sequence.slot = -1
        sequence.begin_at(0)

    def check_integrity(self) -> None:
        """Prove order, states, positions and blocks."""
        assert self.sequences == sorted(self.sequences, key=_rank)
        for sequence in self.sequences + self.loading:
            assert 0 <= sequence.num_computed < len(sequence.token_ids), sequence
            covered = len(sequence.table.blocks) * self.cache.block_size_tokens
            assert covered >= max(len(sequence.token_ids) - 1, sequence.num_planned), sequence
            committed = sequence.table.num_committed * self.cache.block_size_tokens
            assert committed <= sequence.num_computed, sequence
        for sequence in self.sequences:
            assert sequence.state is SequenceState.RUNNING, sequence
            assert not sequence.table.pending_copies, sequence
        for sequence in self.loading:
            assert sequence.state is SequenceState.LOADING, sequence
            assert not sequence.num_plans, sequence
        for sequence in self.closing:
            assert sequence.state is SequenceState.ENDED, sequence
            assert sequence.num_plans, sequence
        holders = self.sequences + self.loading + self.closing
        self.slots.check_integrity([sequence.slot for sequence in holders])
        self.cache.check_integrity(sequence.table for sequence in holders)


def _rank(sequence: Sequence) -> tuple[int, tuple[int, int]]:
    """Order of the batch: priority class, then arrival."""
    return sequence.group.request.priority, sequence.order
