"""What steps and copies cost, fitted online from what was measured.

Owns the fits and what they predict. Does not know blocks, requests or tiers, nor who decides what
by them.

    step seconds = step_s + prefill_token_s * tokens + prefill_context_s * context
                          + decode_row_s * rows + decode_context_s * context
    copy seconds = latency_s + seconds_per_byte * bytes                       per direction

Each is a least-squares fit of relative errors with exponential forgetting and no cost below 0. The
normal equations are solved by coordinate descent (Hildreth's method for non-negative costs) from
the last solution on, a few sweeps per sample. So a direction that the samples say nothing of, as in
a long run of equal decode steps, keeps what it had; recursive least squares with forgetting would
forget it and then follow the noise. Steps with prefill and steps without have equations of their
own, which are forgotten only by samples of their own kind.

One late step or copy says nothing of the costs (the thread was not scheduled) and is left out; two
in a row are a change, and then what was before counts less.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add, mul

from rillgate_server.core.load import FittedCosts
from rillgate_server.core.step import CopyDirection

MIN_PREFILLS = 3
"""Steps with prefill before the next is predicted: a process is late with its first one, and who is
refused for what that one says measures nothing."""
_STEP_MEMORY = 0.99
"""Weight of a sample after one more of its kind: about the last 100 steps count."""
_COPY_MEMORY = 0.85
"""About the last 7 copies count: a throttled bus must show within 20."""
_SURPRISE_RATIO = 2.0
"""Between measured and predicted: noise on a busy machine stays below, mostly."""
_SURPRISE_MEMORY = 0.3
"""What earlier samples still weigh once the costs have changed."""
_NUM_SWEEPS = 2
"""Of coordinate descent per sample: it goes on from where it was, so few will do."""
_CHUNK_MEMORY = 0.98
"""How fast the largest chunk seen is forgotten: about the last 50 steps with prefill."""
_AVERAGE_WEIGHT = 0.2
"""Of the newest sample in moving averages: about the last ten count."""

_PREFILL_TOKEN, _PREFILL_CONTEXT, _STEP, _DECODE_ROW, _DECODE_CONTEXT = range(5)
"""Places of the costs of a step. What the samples cannot tell apart goes to the first: a first
prefill is taken to cost by the token, a first decode step to cost the same for any rows."""
_SECOND_PER_BYTE, _LATENCY = range(2)
"""Places of the costs of a copy: copies of one size alone say bandwidth, not latency."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one step computed."""

    num_prefill_tokens: int = 0
    num_prefill_context: int = 0
    """Summed over the prefilled tokens: the tokens that each attends to."""
    num_decode_rows: int = 0
    num_decode_context: int = 0
    """Summed over the decoding rows: the tokens that each attends to."""


class CostModel:
    """Predicts seconds of prefill, decode steps and copies; 0 for what was never measured.

    State: one fit of steps and one per direction of copies; of steps also how many prefilled, the
    largest chunk and the averages below.
    """

    def __init__(self) -> None:
        """Start without measurements."""
        self._steps = _Fit(num_costs=5, num_kinds=2, memory=_STEP_MEMORY)
        self._loads = _Fit(num_costs=2, num_kinds=1, memory=_COPY_MEMORY)
        self._stores = _Fit(num_costs=2, num_kinds=1, memory=_COPY_MEMORY)
        self._num_prefills = 0
        self._chunk_tokens = 0.0  # the largest of late
        self._chunk_context = 0.0  # tokens that a prefilled token attends to, average of late
        self._decode_step_s = 0.0  # of steps without prefill, average of late

    def __repr__(self) -> str:
        return f"CostModel({self.fitted()})"

    def step_done(self, work: StepWork, seconds: float) -> None:
        """Take in one step that was executed; about 20 microseconds."""
        tokens, rows = work.num_prefill_tokens, work.num_decode_rows
        if seconds <= 0.0 or not (tokens or rows):
            return
        sizes = _sizes(work)
        if tokens:
            if self._steps.add(0, sizes, seconds):
                self._note_chunk(tokens, work.num_prefill_context)
        elif self._steps.add(1, sizes, seconds):
            self._decode_step_s = _averaged(self._decode_step_s, seconds)

    def copy_done(self, direction: CopyDirection, num_bytes: int, seconds: float) -> None:
        """Take in one copy that ended well."""
        if seconds > 0.0 and num_bytes > 0:
            is_load = direction is CopyDirection.HOST_TO_DEVICE
            (self._loads if is_load else self._stores).add(0, (num_bytes, 1), seconds)

    def prefill_s(self, start: int, num_tokens: int) -> float:
        """Predict the seconds to compute positions [start, start + num_tokens).

        In chunks as large as the largest of late, whose fixed costs it includes; alone, without
        the decoding rows that share its steps.
        """
        if num_tokens <= 0 or self._num_prefills < MIN_PREFILLS:
            return 0.0
        costs = self._steps.costs
        context = num_tokens * start + num_tokens * (num_tokens + 1) // 2
        return (
            costs[_STEP] * max(1.0, num_tokens / self._chunk_tokens)
            + costs[_PREFILL_TOKEN] * num_tokens
            + costs[_PREFILL_CONTEXT] * context
        )

    def load_s(self, num_bytes: int) -> float:
        """Predict the seconds of one copy to the device tier.

        Until one was measured it is taken to go as fast as those to the host tier, over the same
        bus: else everybody would try a slow one at once.
        """
        return _copy_s(self._loads, num_bytes) or _copy_s(self._stores, num_bytes)

    def store_s(self, num_bytes: int) -> float:
        """Predict the seconds of one copy to the host tier."""
        return _copy_s(self._stores, num_bytes)

    def decode_step_s(self, num_rows: int = 1, num_context: int = 0) -> float:
        """Predict the seconds of a step of `num_rows` that attend to `num_context` in sum."""
        costs = self._steps.costs
        rows_s = costs[_DECODE_ROW] * num_rows
        return costs[_STEP] + rows_s + costs[_DECODE_CONTEXT] * num_context

    def step_s(self, work: StepWork) -> float:
        """Predict the seconds of one step; 0 until steps with prefill and without were measured."""
        if self._num_prefills < MIN_PREFILLS or self._decode_step_s == 0.0:
            return 0.0
        return float(sum(map(mul, self._steps.costs, _sizes(work))))

    @property
    def prefill_tokens_per_s(self) -> float:
        """Rate of prefill in chunks and at contexts as of late; 0 until measured."""
        if self._num_prefills == 0:
            return 0.0
        costs = self._steps.costs
        per_token = costs[_PREFILL_TOKEN] + costs[_PREFILL_CONTEXT] * self._chunk_context
        seconds = costs[_STEP] + per_token * self._chunk_tokens
        return self._chunk_tokens / seconds if seconds > 0.0 else 0.0

    @property
    def recent_decode_step_s(self) -> float:
        """Seconds of a step without prefill, averaged over the last ten; 0 until measured."""
        return self._decode_step_s

    def fitted(self) -> FittedCosts:
        """Return all costs as they are now."""
        steps = self._steps.costs
        return FittedCosts(
            step_s=steps[_STEP],
            prefill_token_s=steps[_PREFILL_TOKEN],
            prefill_context_s=steps[_PREFILL_CONTEXT],
            decode_row_s=steps[_DECODE_ROW],
            decode_context_s=steps[_DECODE_CONTEXT],
            load_latency_s=self._loads.costs[_LATENCY],
            load_bytes_per_s=_inverse(self._loads.costs[_SECOND_PER_BYTE]),
            store_latency_s=self._stores.costs[_LATENCY],
            store_bytes_per_s=_inverse(self._stores.costs[_SECOND_PER_BYTE]),
        )

    def _note_chunk(self, tokens: int, context: int) -> None:
        self._num_prefills += 1
        self._chunk_tokens = max(float(tokens), _CHUNK_MEMORY * self._chunk_tokens)
        self._chunk_context = _averaged(self._chunk_context, context / tokens)


class _Fit:
    """Non-negative costs per unit of size, fitted to seconds.

    State: the costs; per kind of sample the normal equations, and which way the last one was
    surprising.
    """

    def __init__(self, num_costs: int, num_kinds: int, memory: float) -> None:
        self.costs = [0.0] * num_costs
        self._memory = memory
        self._row_len = num_costs + 1
        # kind -> rows, one after the other: sums of sizes[i] * sizes[j] for each j, then of
        # sizes[i] * seconds
        self._equations = [[0.0] * (num_costs * self._row_len) for _ in range(num_kinds)]
        self._surprises = [0] * num_kinds  # 1: the last took too long, -1: too short, 0: neither

    def add(self, kind: int, sizes: Sequence[int], seconds: float) -> bool:
        """Take in a sample; return False if it is left out as an outlier."""
        predicted = sum(map(mul, self.costs, sizes))
        memory = self._memory
        surprise = 0
        if predicted > 0.0:
            surprise = (seconds > _SURPRISE_RATIO * predicted) - (
                seconds * _SURPRISE_RATIO < predicted
            )
        is_repeated = surprise == self._surprises[kind]
        self._surprises[kind] = surprise
        if surprise > 0 and not is_repeated:
            return False
        if surprise:
            memory *= _SURPRISE_MEMORY
        # The larger of both, so that no sample's relative error exceeds 1, however late it was.
        scale = 1.0 / max(seconds, predicted)
        self._accumulate(kind, memory, [size * scale for size in sizes], seconds * scale)
        self._descend()
        return True

    def _accumulate(self, kind: int, memory: float, sizes: Sequence[float], seconds: float) -> None:
        values = (*sizes, seconds)
        products = [size * value for size in sizes for value in values]
        self._equations[kind] = [
            memory * old + new for old, new in zip(self._equations[kind], products, strict=True)
        ]

    def _descend(self) -> None:
        """Minimize along one cost after the other, never below 0."""
        costs, row_len = self.costs, self._row_len
        equations = self._equations[0]
        for other in self._equations[1:]:
            equations = list(map(add, equations, other))
        rows = [equations[i : i + row_len] for i in range(0, len(equations), row_len)]
        for _ in range(_NUM_SWEEPS):
            for i, row in enumerate(rows):
                if row[i] > 0.0:
                    explained = sum(map(mul, row, costs))  # ends before the row's seconds
                    costs[i] = max(0.0, costs[i] + (row[-1] - explained) / row[i])


def _sizes(work: StepWork) -> tuple[int, ...]:
    """List what each cost is multiplied by, in the costs' order."""
    return (
        work.num_prefill_tokens,
        work.num_prefill_context,
        1,
        work.num_decode_rows,
        work.num_decode_context,
    )


def _copy_s(fit: _Fit, num_bytes: int) -> float:
    if num_bytes <= 0:
        return 0.0
    return fit.costs[_LATENCY] + fit.costs[_SECOND_PER_BYTE] * num_bytes


def _averaged(average: float, sample: float) -> float:
    return sample if average == 0.0 else average + _AVERAGE_WEIGHT * (sample - average)


def _inverse(seconds_per_byte: float) -> float:
    return 1.0 / seconds_per_byte if seconds_per_byte > 0.0 else 0.0
