"""The launches of one call of the device's sampler.

Owns what the kernels leave for each other, and how many programs run. Does not know which rows are
drawn (gpu.device_sampler) nor how (gpu.sampling_kernels, which also says where this may be
imported).
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from rillgate_server.worker.gpu import sampling_kernels as kernels
from rillgate_server.worker.gpu.sampling_filter import choose_filter
from rillgate_server.worker.gpu.sampling_tables import SamplingTables

PART_LEN = 2048
"""Tokens of a part. A vocabulary of 150,000 makes 75 programs of one row, and for a top_k of up to
75 the parts' largest logits tell which few tokens it may keep."""
_TILE = 2048
"""Weights that a pass of a filter compares with all pivots at once."""


@dataclass(frozen=True, slots=True)
class DrawnBatch:
    """The rows of one call, and what the kernels leave for each other; all on the device."""

    logits: Tensor
    """[num_rows, vocab_size], bfloat16, float16 or float32; rows may lie apart."""
    rows: Tensor
    """[4, num_rows], int32: of each row its slot and the tokens generated before; then the drawn
    rows, filtered ones first; then those that want log-probabilities."""
    tables: SamplingTables
    any_entries: bool
    """Whether any of the rows' slots has a row of entries: without, the kernels run faster."""
    part_len: int
    raw_bests: Tensor
    """[num_rows, num_parts], float32: +inf where the part has a NaN."""
    bests: Tensor
    """[num_rows, num_parts], float64: after ban, bias and penalties."""
    best_ids: Tensor
    """[num_rows, num_parts], int32: the lowest of that value."""
    sums: Tensor
    """[num_rows, num_parts], float64: of the weights that are kept."""
    thresholds: Tensor
    """[num_rows], float64: the least weight that is kept."""
    token_ids: Tensor
    """[num_rows], int64."""

    @classmethod
    def of(
        cls,
        logits: Tensor,
        rows: Tensor,
        tables: SamplingTables,
        any_entries: bool,
        part_len: int,
    ) -> "DrawnBatch":
        """Make room for what the kernels leave."""
        num_rows, vocab_size = logits.shape
        assert vocab_size == tables.vocab_size, (vocab_size, tables.vocab_size)
        assert logits.stride(1) == 1, "a row of logits lies in one piece"
        num_parts = triton.cdiv(vocab_size, part_len)
        parts = num_rows, num_parts
        return cls(
            logits,
            rows,
            tables,
            any_entries,
            part_len,
            logits.new_empty(*parts, dtype=torch.float32),
            logits.new_empty(*parts, dtype=torch.float64),
            logits.new_empty(*parts, dtype=torch.int32),
            logits.new_empty(*parts, dtype=torch.float64),
            logits.new_empty(num_rows, dtype=torch.float64),
            logits.new_empty(num_rows, dtype=torch.int64),
        )

    @property
    def num_rows(self) -> int:
        """Of logits."""
        return len(self.logits)

    @property
    def num_parts(self) -> int:
        """Of a row."""
        return self.sums.shape[1]

    @property
    def inputs(self) -> tuple[Tensor, int, Tensor, int]:
        """What most kernels begin with."""
        return self.logits, self.logits.stride(0), self.rows, self.num_rows

    @property
    def slot_tables(self) -> tuple[Tensor, ...]:
        """What most kernels go on with."""
        tables = self.tables
        return tables.fractions, tables.wholes, tables.entries, tables.biases


@dataclass(frozen=True, slots=True)
class Candidates:
    """Weights that filters may keep."""

    weights: Tensor
    """[num_rows, num_parts, part_len], float64: each part's candidates close together, first."""
    counts: Tensor
    """[num_rows, num_parts], int32."""

    @classmethod
    def of(cls, batch: DrawnBatch, num_rows: int) -> "Candidates":
        """Make room for those of so many rows."""
        parts = (num_rows, batch.num_parts)
        return cls(
            batch.sums.new_empty(*parts, batch.part_len),
            batch.sums.new_empty(*parts, dtype=torch.int32),
        )


def find_best(batch: DrawnBatch) -> None:
    """Find each part's largest logits."""
    kernels.find_best[batch.num_rows, batch.num_parts](
        *batch.inputs,
        *batch.slot_tables,
        batch.raw_bests,
        batch.bests,
        batch.best_ids,
        VOCAB_SIZE=batch.tables.vocab_size,
        NUM_PARTS=batch.num_parts,
        PART_LEN=batch.part_len,
        ANY_ENTRIES=batch.any_entries,
        num_warps=8,
        enable_fp_fusion=False,
    )


def weigh(batch: DrawnBatch, candidates: Candidates | None, first: int, num_rows: int) -> None:
    """Sum the weights of `num_rows` drawn rows from the `first` on.

    candidates: of as many of them as are filtered; None where none is.
    """
    kernels.weigh[num_rows, batch.num_parts](
        *batch.inputs,
        first,
        *batch.slot_tables,
        batch.raw_bests,
        batch.bests,
        batch.best_ids,
        batch.sums,
        batch.thresholds,
        batch.sums if candidates is None else candidates.weights,
        batch.best_ids if candidates is None else candidates.counts,
        VOCAB_SIZE=batch.tables.vocab_size,
        NUM_PARTS=batch.num_parts,
        PARTS=triton.next_power_of_2(batch.num_parts),
        PART_LEN=batch.part_len,
        ANY_ENTRIES=batch.any_entries,
        num_warps=8,
        enable_fp_fusion=False,
    )


def choose_filters(batch: DrawnBatch, candidates: Candidates, first: int, num_rows: int) -> None:
    """Find what the filters of `num_rows` drawn rows keep, from the `first` on."""
    parts = triton.next_power_of_2(batch.num_parts)
    choose_filter[(num_rows,)](
        batch.rows,
        batch.num_rows,
        first,
        batch.tables.fractions,
        batch.tables.wholes,
        batch.sums,
        batch.thresholds,
        candidates.weights,
        candidates.counts,
        NUM_PARTS=batch.num_parts,
        PARTS=parts,
        PART_LEN=batch.part_len,
        COLUMNS=min(max(1, _TILE // parts), triton.next_power_of_2(batch.part_len)),
        num_warps=16,
        enable_fp_fusion=False,
    )


def pick(batch: DrawnBatch, any_drawn: bool) -> None:
    """Choose each row's token and note it in its slot."""
    kernels.pick[(batch.num_rows,)](
        *batch.inputs,
        *batch.slot_tables,
        batch.tables.last_tokens,
        batch.raw_bests,
        batch.bests,
        batch.best_ids,
        batch.sums,
        batch.thresholds,
        batch.token_ids,
        VOCAB_SIZE=batch.tables.vocab_size,
        NUM_PARTS=batch.num_parts,
        PARTS=triton.next_power_of_2(batch.num_parts),
        PART_LEN=batch.part_len,
        ANY_ENTRIES=batch.any_entries,
        ANY_DRAWN=any_drawn,
        num_warps=8,
        enable_fp_fusion=False,
    )
