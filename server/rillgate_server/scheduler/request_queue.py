"""The choices that wait for a slot and for blocks: first come, first served.

Owns the order. A preempted choice, and a choice that waited for its prompt, come back to the place
that their arrival gives them, which is near the head. Does not know limits (admission does).
"""

from bisect import insort
from collections import deque
from operator import attrgetter

from rillgate_server.scheduler.sequence import Sequence, SequenceState

_order = attrgetter("order")


class RequestQueue:
    """Sequences in state WAITING, by order of arrival.

    State: the deque, and the sum of its sequences' tokens.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._sequences: deque[Sequence] = deque()
        self.num_tokens = 0
        """Known tokens of all that wait; how many of them are cached shows when they start."""

    def __repr__(self) -> str:
        return f"RequestQueue(sequences={len(self._sequences)}, tokens={self.num_tokens})"

    def __len__(self) -> int:
        return len(self._sequences)

    def __bool__(self) -> bool:
        return bool(self._sequences)

    @property
    def head(self) -> Sequence:
        """The next one."""
        return self._sequences[0]

    def push(self, sequence: Sequence) -> None:
        """Put a sequence where its order says; O(1) for the newest and for the oldest."""
        sequence.state = SequenceState.WAITING
        self.num_tokens += len(sequence.token_ids)
        if not self._sequences or sequence.order > self._sequences[-1].order:
            self._sequences.append(sequence)
        elif sequence.order < self._sequences[0].order:
            self._sequences.appendleft(sequence)
        else:
            insort(self._sequences, sequence, key=_order)

    def pop(self) -> Sequence:
        """Take the head."""
        sequence = self._sequences.popleft()
        self.num_tokens -= len(sequence.token_ids)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take one out; costs O(waiting), which only aborts pay."""
        self._sequences.remove(sequence)
        self.num_tokens -= len(sequence.token_ids)

    def check_integrity(self) -> None:
        """Prove order, states and the sum."""
        sequences = list(self._sequences)
        assert sequences == sorted(sequences, key=_order)
        assert self.num_tokens == sum(len(s.token_ids) for s in sequences)
        for sequence in sequences:
            assert sequence.state is SequenceState.WAITING, sequence
            assert sequence.slot == -1, sequence
            assert not sequence.table.blocks, sequence
            assert sequence.num_computed == 0, sequence
