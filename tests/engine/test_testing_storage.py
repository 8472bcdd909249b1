"""The fake's two tiers: copies arrive when they end, and whoever meddles with one is noticed."""

from collections.abc import Callable

import pytest

from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import (
    CopyDirection,
    CopyJob,
    RowPlan,
    SlotStart,
    StepPlan,
    StepResult,
)
from rillgate_server.engine.testing import CacheMismatch, FakeCopies, FakeExecutor
from tests.support.answers import MODEL

SIZE = 4
OUT, IN = CopyDirection.DEVICE_TO_HOST, CopyDirection.HOST_TO_DEVICE
PROMPT = tuple(range(10, 18))
SAMPLING = SamplingParams(seed=1, temperature=0.0)


def job(copy_id: int, direction: CopyDirection, *pairs: tuple[int, int]) -> CopyJob:
    """Make a copy."""
    return CopyJob(copy_id, direction, pairs)


class Bench:
    """An executor with 8 device and 8 host blocks, given plans by hand."""

    def __init__(
        self,
        copies: FakeCopies,
        before_step: Callable[[StepPlan], None] | None = None,
    ) -> None:
        """Start empty."""
        self.executor = FakeExecutor(8, SIZE, MODEL, before_step=before_step, copies=copies)
        self._step_id = 0

    def step(
        self,
        *copies: CopyJob,
        starts: tuple[SlotStart, ...] = (),
        rows: tuple[RowPlan, ...] = (),
        ended: tuple[int, ...] = (),
    ) -> StepResult:
        """Execute one plan."""
        self._step_id += 1
        return self.executor.execute(StepPlan(self._step_id, starts, rows, ended, copies))

    def compute(self, slot: int, *blocks: int, copies: tuple[CopyJob, ...] = ()) -> StepResult:
        """Compute the whole prompt in a fresh slot over these blocks."""
        start = SlotStart(slot, PROMPT, len(PROMPT), blocks, SAMPLING, 0)
        return self.step(*copies, starts=(start,), rows=(RowPlan(slot, 0, len(PROMPT)),))

    def read(self, slot: int, *blocks: int, copies: tuple[CopyJob, ...] = ()) -> StepResult:
        """Compute the prompt's last token alone; the other blocks must hold the rest."""
        start = SlotStart(slot, PROMPT, len(PROMPT), blocks, SAMPLING, 0)
        row = RowPlan(slot, len(PROMPT) - 1, 1)
        return self.step(*copies, starts=(start,), rows=(row,))


def bench(**settings: object) -> Bench:
    """Make a bench with a host tier of 8 blocks."""
    return Bench(FakeCopies(num_host_blocks=8, **settings))  # type: ignore[arg-type]


def test_what_went_out_comes_back() -> None:
    """Out of two blocks, into two others, and the row over those draws the same token."""
    it = bench()
    drawn = it.compute(0, 0, 1).token_ids
    (stored,) = it.step(job(0, OUT, (0, 5), (1, 3))).finished_copies
    (loaded,) = it.step(job(1, IN, (5, 6), (3, 7))).finished_copies
    assert (stored.copy_id, stored.failed_pairs, loaded.failed_pairs) == (0, (), ())
    assert it.read(1, 6, 7).token_ids == drawn


def test_a_copy_ends_after_its_steps_and_plans_without_rows_count() -> None:
    """It is reported once, by the first result after its end; a short one may overtake it."""
    it = bench(
        copy_steps=lambda copy: 2 if copy.copy_id == 0 else 0, block_bytes=100,
        seconds_per_block=0.5,
    )  # fmt: skip
    it.compute(0, 0, 1)
    ended = [it.step(job(0, OUT, (0, 0)), job(1, OUT, (1, 1), (0, 2))).finished_copies]
    assert it.executor.num_copies_in_flight == 1
    ended += [it.step().finished_copies for _ in range(3)]
    assert [[done.copy_id for done in dones] for dones in ended] == [[1], [], [0], []]
    (done,) = ended[0]
    assert (done.num_bytes, done.seconds, done.checksums) == (200, 1.0, ())
    assert it.executor.num_copies_in_flight == 0


def test_what_a_failed_pair_left_is_noticed() -> None:
    """Either way: the target holds nothing that anybody could take for the right thing."""
    it = bench(fail_copies=lambda copy: (1,) if copy.direction is OUT else (0,))
    it.compute(0, 0, 1)
    (stored,) = it.step(job(0, OUT, (0, 0), (1, 1))).finished_copies
    assert (stored.failed_pairs, stored.num_bytes) == ((1,), 1024)
    assert stored.message
    it.step(job(1, IN, (1, 4), (0, 5), (1, 6)))
    for first, second in ((4, 1), (5, 6)):  # failed on its way in; poisoned on its way out
        with pytest.raises(CacheMismatch, match=r"holds \(-1, -1\)"):
            it.read(1, first, second)
        it.step(ended=(1,))
    it.read(1, 5, 1)


def test_checksums_go_out_and_a_block_that_changed_is_refused() -> None:
    """The pair that does not match fails; its neighbour is good."""
    it = bench(audit=True)
    it.compute(0, 0, 1)
    (stored,) = it.step(job(0, OUT, (0, 0), (1, 1))).finished_copies
    assert len(set(stored.checksums)) == 2
    it.executor.corrupt(1)
    back = CopyJob(1, IN, ((0, 6), (1, 7)), stored.checksums)
    (loaded,) = it.step(back).finished_copies
    assert loaded.failed_pairs == (1,)
    it.read(1, 6, 1)
    it.step(ended=(1,))
    with pytest.raises(CacheMismatch):
        it.read(1, 6, 7)


def test_a_corrupt_block_is_noticed_without_checksums_too() -> None:
    """By the row that reads it: this is what the audit mode is for."""
    it = bench()
    it.compute(0, 0, 1)
    it.step(job(0, OUT, (0, 0)))
    it.executor.corrupt(0)
    it.step(job(1, IN, (0, 5)))
    with pytest.raises(CacheMismatch, match="block 5 holds"):
        it.read(1, 5, 1)


def test_copies_of_a_step_that_raises_have_begun() -> None:
    """They end with a later step, which reports them."""

    def fail_second(plan: StepPlan) -> None:
        if plan.step_id == 2:
            raise RuntimeError("lost")

    it = Bench(FakeCopies(num_host_blocks=8), fail_second)
    it.compute(0, 0, 1)
    with pytest.raises(RuntimeError, match="lost"):
        it.step(job(0, OUT, (0, 0)))
    assert [done.copy_id for done in it.step().finished_copies] == [0]


def out_in_flight(it: Bench) -> None:
    """Leave device block 1 on its way to host block 1, for long; host block 0 holds block 0."""
    it.compute(0, 0, 1)
    it.step(job(0, OUT, (0, 0)))
    it.step(ended=(0,))
    it.step(job(1, OUT, (1, 1)))


def in_flight(it: Bench) -> None:
    """Leave host block 0 on its way to device block 5, for long."""
    it.compute(0, 0, 1)
    it.step(job(0, OUT, (0, 0)))
    it.step(ended=(0,))
    it.step(job(1, IN, (0, 5)))


HAZARDS: dict[
    str, tuple[Callable[[Bench], None], Callable[[Bench], object], str]
] = {
    "a row writes what is on its way out": (
        out_in_flight, lambda it: it.compute(0, 2, 1), "block 1 is written while a copy reads it",
    ),
    "a row reads what is on its way in": (
        in_flight, lambda it: it.read(0, 5, 1), "block 5 is read while a copy fills it",
    ),
    "a row writes what is on its way in": (
        in_flight, lambda it: it.compute(0, 5, 1), "block 5 is read while a copy fills it",
    ),
    "a row grows into what is on its way in": (
        in_flight,
        lambda it: (
            it.step(
                starts=(SlotStart(0, PROMPT, len(PROMPT), (2,), SAMPLING, 0),),
                rows=(RowPlan(0, 0, SIZE, samples=False),),
            ),
            it.step(rows=(RowPlan(0, SIZE, SIZE, (5,)),)),
        ),
        "block 5 is written while a copy fills it",
    ),
    "a block is loaded over while it is on its way out": (
        out_in_flight, lambda it: it.step(job(2, IN, (0, 1))),
        "device block 1 is written while a copy reads it",
    ),
    "a block is loaded before it is stored": (
        out_in_flight, lambda it: it.step(job(2, IN, (1, 6))),
        "host block 1 is read while a copy fills it",
    ),
    "two copies fill one host block": (
        out_in_flight, lambda it: it.step(job(2, OUT, (0, 1))),
        "host block 1 is written while a copy fills it",
    ),
    "two copies fill one device block": (
        in_flight, lambda it: it.step(job(2, IN, (0, 5))),
        "device block 5 is written while a copy fills it",
    ),
    "a block is stored before it is loaded": (
        in_flight, lambda it: it.step(job(2, OUT, (5, 6))),
        "device block 5 is read while a copy fills it",
    ),
    "a block is stored over while it is on its way in": (
        in_flight, lambda it: it.step(job(2, OUT, (0, 0))),
        "host block 0 is written while a copy reads it",
    ),
    "one copy fills a block twice": (
        in_flight, lambda it: it.step(job(2, OUT, (0, 6), (1, 6))),
        "host block 6 is written while a copy fills it",
    ),
    "a copy without blocks": (
        in_flight, lambda it: it.step(job(2, OUT)), "has no pairs",
    ),
    "a number left out": (
        in_flight, lambda it: it.step(job(3, OUT, (1, 6))), "copy 3 follows copy 1",
    ),
    "a host block that is not there": (
        in_flight, lambda it: it.step(job(2, OUT, (1, 8))), "the host tier has no block 8",
    ),
    "a checksum that nobody wants": (
        in_flight, lambda it: it.step(CopyJob(2, OUT, ((1, 6),), (7,))), "has 1 checksums",
    ),
}  # fmt: skip
"""name -> (what is in flight, what is done then, what is said)"""


@pytest.mark.parametrize("hazard", HAZARDS)
def test_a_hazard_is_noticed(hazard: str) -> None:
    """While a copy is in flight its blocks are its own; the same step without it is well."""
    prepare, meddle, message = HAZARDS[hazard]
    it = bench(copy_steps=lambda copy: 100 * copy.copy_id)
    prepare(it)
    with pytest.raises(CacheMismatch, match=message):
        meddle(it)


def test_what_a_copy_reads_may_be_read() -> None:
    """A shared block on its way out serves those who share it."""
    it = bench(copy_steps=lambda copy: 100 * copy.copy_id)
    out_in_flight(it)
    it.step(
        starts=(SlotStart(0, (*PROMPT, 5), 9, (0, 1, 2), SAMPLING, 0),), rows=(RowPlan(0, 8, 1),)
    )
    assert it.executor.num_copies_in_flight == 1


def test_a_copy_is_in_flight_while_its_own_step_computes() -> None:
    """However short it is: a machine promises nothing else."""
    it = bench()
    it.compute(0, 0, 1)
    it.step(job(0, OUT, (0, 0)), ended=(0,))
    with pytest.raises(CacheMismatch, match="device block 5 is read while a copy fills it"):
        it.read(0, 5, 1, copies=(job(1, IN, (0, 5)),))


def test_the_same_tokens_behind_others_are_not_the_same_block() -> None:
    """A block belongs to everything before it, as real keys and values do."""
    it = bench()
    it.compute(0, 0, 1)
    other = (*range(60, 64), *PROMPT[SIZE:])
    it.step(
        starts=(SlotStart(1, other, len(other), (2, 3), SAMPLING, 0),),
        rows=(RowPlan(1, 0, SIZE, samples=False),),
    )
    with pytest.raises(CacheMismatch, match="slot 2, position 4: block 1"):
        it.step(
            starts=(SlotStart(2, (*other, 5), len(other), (2, 1, 4), SAMPLING, 0),),
            rows=(RowPlan(2, 8, 1),),
        )
