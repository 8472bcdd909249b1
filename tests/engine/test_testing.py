"""The fake data plane notices what a real one would only answer wrongly to."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from rillgate_server.core.step import RowPlan, SlotStart, StepPlan, StepResult
from rillgate_server.engine.testing import CacheMismatch, FakeExecutor
from tests.support.answers import MODEL
from tests.support.engine import Driver, Limits, make_request

BLOCK_SIZE = 4


class Tampering:
    """Changes plans on their way to the executor."""

    def __init__(self, tamper: Callable[[StepPlan], StepPlan]) -> None:
        """Execute with 64 blocks of 4 tokens."""
        self.inner = FakeExecutor(64, BLOCK_SIZE, MODEL)
        self._tamper = tamper

    def execute(self, plan: StepPlan) -> StepResult:
        """Execute the changed plan."""
        return self.inner.execute(self._tamper(plan))


def with_starts(change: Callable[[SlotStart], SlotStart]) -> Callable[[StepPlan], StepPlan]:
    """Change every slot that starts after the first step, where prefixes are shared."""
    return lambda plan: (
        replace(plan, starts=tuple(map(change, plan.starts))) if plan.step_id > 1 else plan
    )


def with_rows(change: Callable[[RowPlan], RowPlan]) -> Callable[[StepPlan], StepPlan]:
    """Change every row from the second step on."""
    return lambda plan: (
        replace(plan, rows=tuple(map(change, plan.rows))) if plan.step_id > 1 else plan
    )


def shifted_table(start: SlotStart) -> SlotStart:
    """Name the block after each right one."""
    return replace(start, block_table=tuple((b + 1) % 64 for b in start.block_table))


def swapped_table(start: SlotStart) -> SlotStart:
    """Name the right blocks in the wrong order."""
    first, second, *others = start.block_table
    return replace(start, block_table=(second, first, *others))


def other_token(start: SlotStart) -> SlotStart:
    """Pretend that the shared prefix holds another token."""
    return replace(start, token_ids=(98, *start.token_ids[1:]))


FAULTS: dict[str, Callable[[StepPlan], StepPlan]] = {
    "a block table off by one": with_starts(shifted_table),
    "two blocks swapped": with_starts(swapped_table),
    "a prefix hit on other tokens": with_starts(other_token),
    "positions one too high": with_rows(lambda row: replace(row, start=row.start + 1)),
    "positions one too low": with_rows(lambda row: replace(row, start=row.start - 1)),
    "a new block withheld": with_rows(lambda row: replace(row, new_blocks=())),
    "a row that ends too early": with_rows(
        lambda row: replace(row, num_tokens=max(1, row.num_tokens - 1))
    ),
}


def share_a_prefix(driver: Driver) -> None:
    """One request computes a prefix, the next one hits it and grows over a block's border."""
    driver.submit(make_request(1, prompt=range(10, 22), max_tokens=9))
    driver.step()
    driver.submit(make_request(2, prompt=[*range(10, 22), 5, 6, 7], max_tokens=9))
    driver.run()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault: str) -> None:
    """Off by one in a table, a position or a count is never just another answer."""
    driver = Driver(Limits(block_size_tokens=BLOCK_SIZE))
    driver.executor = Tampering(FAULTS[fault])
    with pytest.raises(CacheMismatch):
        share_a_prefix(driver)


def test_without_a_fault_nothing_is_noticed() -> None:
    """The same trace, untouched, gives the reference answers."""
    driver = Driver(Limits(block_size_tokens=BLOCK_SIZE))
    driver.executor = Tampering(lambda plan: plan)
    share_a_prefix(driver)
    driver.check_answers()
    assert driver.scheduler.load(0.0).num_cached_tokens == 12


def test_a_stale_block_is_noticed() -> None:
    """A block whose contents are another sequence's, though every table is right."""
    driver = Driver(Limits(block_size_tokens=BLOCK_SIZE))
    stale = FakeExecutor(64, BLOCK_SIZE, MODEL)
    driver.submit(make_request(1, prompt=range(10, 22)))
    driver.run()
    driver.executor = stale  # the cache's contents are gone, the scheduler does not know
    driver.submit(make_request(2, prompt=range(10, 22)))
    with pytest.raises(CacheMismatch, match="holds None, expected token 10"):
        driver.run()


def test_a_slot_that_starts_twice_is_noticed() -> None:
    """A scheduler that forgets to end slots would mix two requests' tokens."""
    driver = Driver(Limits(max_running=1))
    driver.executor = Tampering(lambda plan: replace(plan, ended_slots=()))
    driver.submit(make_request(1))
    driver.submit(make_request(2))
    with pytest.raises(CacheMismatch, match="starts and has not ended"):
        driver.run()


def test_rows_fail_as_the_hook_says() -> None:
    """The message and the slot come back, and no token."""

    def fail(row: RowPlan, context: Sequence[int]) -> str | None:
        return f"row at {row.start}" if len(context) == 11 else None

    executor = FakeExecutor(64, BLOCK_SIZE, MODEL, fail_rows=fail)
    driver = Driver()
    driver.executor = executor
    driver.submit(make_request(1))
    driver.run()
    assert driver.answers.of[1].failure == "row at 10"
    assert executor.num_steps == 2
