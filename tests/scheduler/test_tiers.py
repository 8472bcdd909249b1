"""A block's way through both tiers, one phase at a time.

The fake data plane poisons what a copy fills and compares what every row reads, so each right
answer here also says that the right bytes came.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from rillgate_server.core.request import ChoiceStart
from rillgate_server.core.step import CopyDirection, CopyJob, RowPlan
from rillgate_server.engine.testing import FakeCopies
from tests.support.engine import Driver, make_request
from tests.support.tiers import (
    IN,
    LIMITS,
    NUM_HIT_TOKENS,
    OUT,
    PROMPT_TOKENS,
    ask,
    failing,
    fill,
    found,
    in_host_tier,
    jobs,
    load_of,
    prompt,
    question,
    slow,
    step_until,
    with_copy_in_flight,
)

# -- demotion and promotion -----------------------------------------------------------------------


def test_what_was_evicted_comes_back_from_the_host_tier() -> None:
    """It was saved before its room was needed, and is found whole; nothing was lost unsaved."""
    driver = in_host_tier()
    before = load_of(driver)
    assert before.device.num_evicted_blocks > 0
    assert before.copies.num_stored_blocks == before.host.num_blocks_cached > 3
    assert before.copies.num_unsaved_blocks == before.copies.num_loaded_blocks == 0
    assert found(driver, question(2, 0)) == (0, NUM_HIT_TOKENS)
    after = load_of(driver)
    assert after.copies.num_loaded_blocks == 3
    assert after.copies.num_loaded_bytes == 3 * after.copies.num_stored_bytes // (
        after.copies.num_stored_blocks
    )
    assert (after.decisions.num_loads, after.decisions.num_loaded_tokens) == (1, NUM_HIT_TOKENS)
    assert found(driver, question(3, 0)) == (NUM_HIT_TOKENS, 0), "it is in the device tier again"


def test_with_free_blocks_nothing_is_copied() -> None:
    """A save costs a copy, and may never be needed."""
    driver = Driver(replace(LIMITS, num_blocks=64))
    for number in range(8):
        ask(driver, question(number, number))
    assert not jobs(driver, OUT)


def test_what_is_used_again_and_again_is_saved_though_there_is_room() -> None:
    """Write-through: a prefix that everybody has is in both tiers before anybody evicts it."""
    driver = Driver(replace(LIMITS, num_blocks=64))
    for request_id in range(4):
        ask(driver, question(request_id, 0))
    load = load_of(driver)
    assert (load.copies.num_stored_blocks, load.host.num_blocks_cached) == (3, 3)
    assert load.device.num_blocks_cached == 3


def test_a_prefix_may_lie_in_both_tiers() -> None:
    """The leaf was evicted and is loaded, its parents are hits where they are."""
    driver = Driver(LIMITS)
    ask(driver, question(1, 0))
    fill(driver, range(1, 5))
    assert load_of(driver).device.num_evicted_blocks == 0
    step_count = 0
    while load_of(driver).device.num_evicted_blocks == 0:
        step_count += 1
        ask(driver, make_request(100 + step_count, [90 + step_count], 1))
        ask(driver, make_request(200 + step_count, [80 - step_count] * 5, 1))
    assert load_of(driver).device.num_evicted_blocks == 1
    assert found(driver, question(2, 0)) == (8, 4)


@pytest.mark.parametrize("limits", [{"num_host_blocks": 0}, {"load_policy": "recompute"}], ids=str)
def test_without_a_host_tier_nothing_is_copied(limits: dict[str, Any]) -> None:
    """Neither without its memory nor when hits in it are not wanted."""
    driver = in_host_tier(**limits)
    assert found(driver, question(2, 0)) == (0, 0)
    assert not any(plan.copies for plan in driver.plans)


# -- a request whose blocks are on the way --------------------------------------------------------


def test_a_loading_request_is_in_no_plan_while_others_run() -> None:
    """It starts with the plan after its copy's end, behind all that was found."""
    driver = in_host_tier(slow(IN))
    first_plan = len(driver.plans)
    driver.submit(question(2, 0))
    driver.submit(question(3, 20, max_tokens=20))
    tokens = driver.answers.of[3].tokens[0]
    for num_steps in range(1, 8):
        assert driver.in_flight or num_steps == 1
        driver.step()
        assert len(tokens) == num_steps, "nobody waits for the copy"
        assert driver.answers.of[2].started is None
        assert load_of(driver).num_loading == 1
    assert all(len(plan.rows) == 1 for plan in driver.plans[first_plan:])
    assert not driver.in_flight
    plan = driver.begin()
    assert plan is not None
    (start,) = plan.starts
    assert start.token_ids == tuple(prompt(0))
    assert (plan.rows[-1].slot, plan.rows[-1].start) == (start.slot, NUM_HIT_TOKENS)
    driver.end(plan)
    driver.run()
    driver.check_answers()
    driver.check_idle()


def test_two_requests_share_one_load_in_flight() -> None:
    """The second one finds the blocks on their way, and waits for the same copy."""
    driver = in_host_tier(slow(IN))
    driver.submit(question(2, 0))
    driver.step()
    driver.submit(question(3, 0))
    driver.step()
    assert load_of(driver).num_loading == 2
    driver.run()
    (job,) = jobs(driver, IN)
    assert len(job.pairs) == 3
    started = driver.answers.of[3].started
    assert started is not None
    assert started.num_cached_tokens == NUM_HIT_TOKENS
    driver.check_answers()
    driver.check_idle()


def test_when_the_one_that_loads_is_aborted_the_other_still_gets_its_blocks() -> None:
    """A copy belongs to nobody but itself."""
    driver = in_host_tier(slow(IN))
    for request_id in (2, 3):
        driver.submit(question(request_id, 0))
        driver.step()
    driver.abort(2)
    driver.run()
    assert len(jobs(driver, IN)) == 1
    driver.check_answers()
    driver.check_idle()


def test_an_abort_during_a_copy_in_leaves_the_blocks_to_the_copy_and_then_cached() -> None:
    """They are nobody's until the copy has ended; the next one finds them in the device tier."""
    driver = in_host_tier(slow(IN))
    driver.submit(question(2, 0))
    driver.step()
    driver.step()
    assert load_of(driver).device.num_blocks_used == 4
    driver.abort(2)
    load = load_of(driver)
    assert (load.device.num_blocks_used, load.device.num_blocks_copying) == (0, 3)
    assert load.num_loading == 0
    driver.check_idle()
    assert found(driver, question(3, 0)) == (NUM_HIT_TOKENS, 0)
    assert len(jobs(driver, IN)) == 1


@pytest.mark.parametrize("direction", CopyDirection)
def test_blocks_of_a_copy_in_flight_are_given_to_nobody(direction: CopyDirection) -> None:
    """Newcomers take all the room there is, and no more; the fake would notice one block."""
    driver = with_copy_in_flight(direction)
    driver.abort(100)
    for number in range(30, 36):
        driver.submit(question(number, number, max_tokens=12))
    assert driver.in_flight
    driver.run()
    driver.check_answers()
    driver.check_idle()


def test_an_abort_during_a_copy_out_changes_nothing_for_the_copy() -> None:
    """Whoever hits a block on its way out reads it where it is, and may go at any time."""
    driver = with_copy_in_flight(OUT)
    driver.submit(question(20, 1, max_tokens=30))
    step_until(driver, lambda: driver.answers.of[20].started is not None)
    sources = {source for job in driver.in_flight.values() for source, _ in job.pairs}
    start = [start for plan in driver.plans for start in plan.starts][-1]
    assert sources & set(start.block_table)
    driver.abort(20)
    assert load_of(driver).device.num_blocks_copying >= len(sources & set(start.block_table))
    driver.run()
    driver.check_idle()
    assert load_of(driver).copies.num_stored_blocks >= len(sources)
    assert sum(found(driver, question(21, 1))) == NUM_HIT_TOKENS


def test_choices_of_a_loaded_prompt_follow_its_first() -> None:
    """The first one loads the prompt, the others find it where it came to."""
    driver = in_host_tier(slow(IN))
    choices = [ChoiceStart(i) for i in range(3)]
    driver.submit(replace(question(2, 0), choices=tuple(choices)))
    driver.run()
    assert sum(len(job.pairs) for job in jobs(driver, IN)) == 3
    driver.check_answers()
    driver.check_idle()


# -- copies that fail -----------------------------------------------------------------------------


def test_what_a_failed_load_should_have_brought_is_computed() -> None:
    """The answer comes, the failure is counted, and the host tier offers those blocks no more."""
    driver = in_host_tier(failing(IN))
    assert found(driver, question(2, 0)) == (0, 0)
    load = load_of(driver)
    assert (load.copies.num_failed_blocks, load.copies.num_loaded_blocks) == (3, 0)
    assert found(driver, question(3, 0)) == (NUM_HIT_TOKENS, 0)
    assert len(jobs(driver, IN)) == 1


def test_what_arrived_beside_a_failed_pair_is_used() -> None:
    """The middle one of three fails: the first is a hit, the third waits behind the gap."""
    driver = in_host_tier(failing(IN, position=1))
    assert found(driver, question(2, 0)) == (4, 0)
    assert load_of(driver).copies.num_failed_blocks == 1


def test_all_who_wait_for_a_failed_load_start_anew() -> None:
    """The one that asked for it, and the one that found it on its way."""

    def fail(job: CopyJob) -> tuple[int, ...]:
        return (0, 1, 2) if job.direction is IN else ()

    driver = in_host_tier(FakeCopies(copy_steps=lambda job: 3, fail_copies=fail))
    for request_id in (2, 3):
        driver.submit(question(request_id, 0))
        driver.step()
    assert load_of(driver).num_loading == 2
    driver.run()
    driver.check_answers()
    driver.check_idle()


def test_what_a_failed_store_should_have_saved_is_not_found() -> None:
    """Its host block is free again, and the prompt is computed."""
    driver = in_host_tier(failing(OUT))
    load = load_of(driver)
    assert load.host.num_blocks_free == load.host.num_blocks
    assert load.copies.num_failed_blocks > 0
    assert found(driver, question(2, 0)) == (0, 0)


def test_a_block_that_changed_in_the_host_tier_is_refused_and_computed() -> None:
    """Audit mode: counted for itself, and never loaded again."""
    driver = in_host_tier(audit=True)
    for block in range(LIMITS.num_host_blocks):
        driver.fake.corrupt(block)
    assert found(driver, question(2, 0)) == (0, 0)
    load = load_of(driver)
    assert (load.copies.num_refused_blocks, load.copies.num_failed_blocks) == (3, 0)
    assert found(driver, question(3, 0)) == (NUM_HIT_TOKENS, 0)


def test_in_audit_mode_sound_blocks_come_back() -> None:
    """Each load carries the sums of its own blocks, also after host blocks had other contents."""
    driver = in_host_tier(audit=True, num_host_blocks=15)
    for request_id in range(2, 20):
        ask(driver, question(request_id, request_id * 5 % 9))
    load = load_of(driver)
    assert load.copies.num_loaded_blocks > 0
    assert load.host.num_evicted_blocks > 0
    assert load.copies.num_refused_blocks == 0


def test_a_lost_step_leaves_its_copies_running() -> None:
    """The step's requests fail; who waits for a copy that began with it still gets its blocks."""
    driver = in_host_tier()
    driver.submit(question(2, 0))
    driver.submit(question(3, 20))
    driver.loses_next_step = True
    driver.step()
    assert driver.answers.of[3].failure is not None
    driver.run()
    started = driver.answers.of[2].started
    assert started is not None
    assert started.num_cached_host_tokens == NUM_HIT_TOKENS
    driver.check_answers()
    driver.check_idle()


def test_a_slot_is_announced_once_though_two_who_never_ran_gave_it_back() -> None:
    """A lost plan named it as ended, and who loads in it since is aborted before the next plan."""
    driver = in_host_tier(slow(IN))
    driver.submit(question(2, 20))
    driver.step()  # it ends: its slot is to be announced
    driver.submit(question(3, 0))
    driver.loses_next_step = True
    driver.step()
    assert driver.plans[-1].ended_slots == (0,)
    assert load_of(driver).num_loading == 1
    driver.abort(3)
    driver.submit(question(4, 21))
    plan = driver.begin()
    assert plan is not None
    assert plan.ended_slots == (0,)
    driver.end(plan)
    driver.run()
    driver.check_answers()
    driver.check_idle()


def test_blocks_of_a_failed_row_are_found_in_neither_tier() -> None:
    """Also by who comes when they are saved already."""
    faults = ["NaN logits"]

    def fail_once(row: RowPlan, context: Sequence[int]) -> str | None:
        is_second = len(context) == PROMPT_TOKENS + 1 and list(context[:13]) == prompt(0)
        return faults.pop() if faults and is_second else None

    driver = Driver(LIMITS, fail_rows=fail_once)
    ask(driver, question(1, 0))
    fill(driver)
    driver.submit(question(2, 0, max_tokens=2))
    driver.run()
    assert driver.answers.of[2].failure == "NaN logits"
    assert jobs(driver, IN)
    assert found(driver, question(3, 0)) == (0, 0)
