"""Slots and packing: no padding, tables that grow, plans that contradict the slots."""

import pytest

from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import RowPlan, SlotStart, StepPlan
from rillgate_server.errors import EngineFailure
from rillgate_server.worker.input_batch import InputBatch

GREEDY = SamplingParams(seed=0, temperature=0.0)


def start(slot: int, tokens: tuple[int, ...], blocks: tuple[int, ...]) -> SlotStart:
    """Start a slot whose tokens are all prompt."""
    return SlotStart(slot, tokens, len(tokens), blocks, GREEDY, 0)


def test_a_step_is_packed_without_padding() -> None:
    """A chunk, a decode row and another chunk lie behind one another."""
    batch = InputBatch(4, 100, 50)
    rows = (RowPlan(0, 2, 5), RowPlan(7, 4, 1), RowPlan(1, 0, 2))
    starts = (
        start(0, tuple(range(10, 20)), (5, 3)),
        start(7, tuple(range(20, 25)), (9, 8)),
        start(1, (30, 31, 32), (2,)),
    )
    batch.apply(StepPlan(0, starts, rows))
    step = batch.pack(rows)
    assert step.token_ids.tolist() == [12, 13, 14, 15, 16, 24, 30, 31]
    assert step.positions.tolist() == [2, 3, 4, 5, 6, 4, 0, 1]
    assert step.slot_mapping[0].tolist() == [5, 5, 3, 3, 3, 8, 2, 2]
    assert step.slot_mapping[1].tolist() == [2, 3, 0, 1, 2, 0, 0, 1]
    assert [row.offset for row in step.rows] == [0, 5, 6]


def test_block_tables_grow_and_keep_their_blocks() -> None:
    """Hundreds of blocks for one slot, while another's table stays; the rest repeats block one."""
    batch = InputBatch(1, 1000, 50)
    tokens = tuple(range(40)) * 10
    plan = StepPlan(0, (start(0, tokens, (7,)), start(1, (1,), (8,))), ())
    batch.apply(plan)
    for block in range(100, 400):
        batch.apply(StepPlan(1, (), (RowPlan(0, 0, 1, (block,)),)))
    first, second = batch.pack((RowPlan(0, 0, 301), RowPlan(1, 0, 1))).rows
    assert first.block_table[:301].tolist() == [7, *range(100, 400)]
    assert set(first.block_table[301:].tolist()) == {7}
    assert set(second.block_table.tolist()) == {8}


def test_only_blocks_behind_the_cached_prefix_are_fresh() -> None:
    """A prefix hit's blocks keep their content; the rest is to be cleared before use."""
    batch = InputBatch(4, 100, 50)
    plan = StepPlan(0, (start(0, tuple(range(11)), (5, 6, 7)),), (RowPlan(0, 8, 3),))
    assert batch.apply(plan) == [7]
    plan = StepPlan(1, (start(1, tuple(range(11)), (5, 6, 8)),), (RowPlan(1, 4, 3),))
    assert batch.apply(plan) == [6, 8]
    assert batch.apply(StepPlan(2, (), (RowPlan(0, 11, 1, (9,)),))) == [9]


def test_a_slot_can_end_and_start_in_one_plan() -> None:
    """The seat is free before the plan's own starts."""
    batch = InputBatch(4, 100, 50)
    batch.apply(StepPlan(0, (start(0, (1, 2), (5,)),), ()))
    batch.apply(StepPlan(1, (start(0, (3, 4, 5), (6,)),), (), ended_slots=(0,)))
    step = batch.pack((RowPlan(0, 0, 3),))
    assert step.token_ids.tolist() == [3, 4, 5]
    assert set(step.slot_mapping[0].tolist()) == {6}


def test_sampled_tokens_are_there_for_the_next_plan() -> None:
    """A plan names a position only; the worker knows the token."""
    batch = InputBatch(4, 100, 50)
    batch.apply(StepPlan(0, (start(0, (1, 2), (5,)),), ()))
    batch.slot(0).append(42)
    assert batch.pack((RowPlan(0, 2, 1),)).token_ids.tolist() == [42]
    assert batch.slot(0).sampling.num_generated == 1


def apply_and_pack(batch: InputBatch, plan: StepPlan) -> None:
    """Do what a step does with a plan before the network sees it."""
    batch.apply(plan)
    batch.pack(plan.rows)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (StepPlan(1, (start(0, (1,), (5,)),), ()), "slot 0 is started but has not ended"),
        (StepPlan(1, (), (RowPlan(3, 0, 1),)), "slot 3 has not been started"),
        (StepPlan(1, (), (RowPlan(0, 0, 1, (100,)),)), "there are 100"),
        (StepPlan(1, (), (RowPlan(0, 0, 1, (-1,)),)), "there are 100"),
        (StepPlan(1, (), (RowPlan(0, -1, 1),)), "-1 to 0"),
        (StepPlan(1, (), (RowPlan(0, 5, 3),)), "5 to 8, it has 6 tokens"),
        (StepPlan(1, (), (RowPlan(0, 0, 0),)), "0 to 0"),
        (StepPlan(1, (), (RowPlan(0, 0, 6),)), "up to 6, its 1 blocks hold 4"),
    ],
)
def test_a_plan_that_contradicts_the_slots_is_refused(plan: StepPlan, message: str) -> None:
    """A wrong plan must never read or write memory of others."""
    batch = InputBatch(4, 100, 50)
    batch.apply(StepPlan(0, (start(0, (1, 2, 3, 4, 5, 6), (5,)),), ()))
    with pytest.raises(EngineFailure, match=message):
        apply_and_pack(batch, plan)
    assert batch.pack((RowPlan(0, 0, 1),)).token_ids.tolist() == [1]
