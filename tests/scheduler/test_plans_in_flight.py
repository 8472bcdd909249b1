"""Two plans in flight: what the second one may know, and what becomes of both."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from rillgate_server.config.groups import BatcherConfig, CacheConfig, SpeculationConfig
from rillgate_server.core.model_spec import CacheSizes
from rillgate_server.core.request import ChoiceStart, FinishReason, Request, Speculation
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import RowPlan
from rillgate_server.engine.testing import FakeSlot
from rillgate_server.scheduler.scheduler import Scheduler
from tests.support.answers import EOS, reference_answer
from tests.support.engine import SPEC, Driver, Limits, make_request
from tests.support.pipelined import TWO, PipelinedDriver, begin_two, num_used, rows_of
from tests.support.tiers import IN, LIMITS, ask, fill, question, slow

LOOKUP = SpeculationConfig("prompt-lookup", 5)


def right_draft_model(driver: Driver) -> Callable[[FakeSlot], tuple[int, ...]]:
    """Make a draft model that knows what comes."""

    def propose(slot: FakeSlot) -> tuple[int, ...]:
        ahead = slot.copy()
        for _ in range(5):
            ahead.append((driver.fake.next_token(ahead),))
        return tuple(ahead.token_ids[len(slot.token_ids) :])

    return propose


def stopping_request(request_id: int = 1) -> tuple[Request, int]:
    """Return a request whose answer ends with a stop id, and its length, at least 3."""
    for seed in range(1000):
        sampling = SamplingParams(seed=seed, temperature=1.0)
        request = replace(
            make_request(request_id, max_tokens=40, sampling=sampling),
            stop_token_ids=frozenset({EOS}),
        )
        tokens, reason = reference_answer(request, ChoiceStart(0))
        if reason is FinishReason.STOP and len(tokens) >= 3:
            return request, len(tokens)
    raise AssertionError("no such seed")


# -- what the second plan holds -------------------------------------------------------------------


def test_the_next_plan_goes_on_behind_a_token_that_nobody_knows_yet() -> None:
    """It names the position; the worker has the token by then. There are never three."""
    driver = PipelinedDriver(TWO)
    driver.submit(make_request(1))
    first, second = begin_two(driver)
    assert rows_of(first) == [(0, 0, 10)]
    assert rows_of(second) == [(0, 10, 1)]
    assert driver.begin() is None
    driver.end()
    assert rows_of(driver.begin()) == [(0, 11, 1)]


def test_a_pending_token_has_its_block() -> None:
    """The block that the pending token's position needs comes with the row."""
    driver = PipelinedDriver(TWO)
    driver.submit(make_request(1, prompt=range(10, 18)))
    first, second = begin_two(driver)
    assert len(first.starts[0].block_table) == 2
    assert len(second.rows[0].new_blocks) == 1


def test_prefill_chunks_follow_one_another_without_a_result() -> None:
    """Their positions are known; the last one makes a pending token, as a decode row does."""
    driver = PipelinedDriver(replace(TWO, max_step_tokens=8))
    driver.submit(make_request(1, prompt=range(10, 30)))
    first, second = begin_two(driver)
    assert (rows_of(first), rows_of(second)) == ([(0, 0, 8)], [(0, 8, 8)])
    driver.end()
    assert rows_of(driver.begin()) == [(0, 16, 4)]
    driver.end()
    assert rows_of(driver.begin()) == [(0, 20, 1)]
    driver.run()
    driver.check_answers()


def test_who_comes_while_a_step_runs_starts_in_the_next_plan() -> None:
    """It does not wait for the result."""
    driver = PipelinedDriver(TWO)
    driver.submit(make_request(1))
    driver.begin()
    driver.submit(make_request(2, prompt=range(40, 45)))
    assert rows_of(driver.begin()) == [(0, 10, 1), (1, 0, 5)]
    driver.run()
    driver.check_answers()


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 6])
def test_nobody_is_computed_beyond_max_tokens(max_tokens: int) -> None:
    """With its last token pending a choice has no row: as many samples as tokens."""
    driver = PipelinedDriver(TWO)
    driver.submit(make_request(1, max_tokens=max_tokens))
    driver.run()
    driver.check_answers()
    assert sum(row.samples for plan in driver.plans for row in plan.rows) == max_tokens


def test_a_choice_may_fill_the_context_and_the_whole_cache() -> None:
    """The last pending token needs no room, here or there."""
    driver = PipelinedDriver(Limits(num_blocks=4, max_plans_in_flight=2))
    assert driver.submit(make_request(1, prompt=range(10, 20), max_tokens=7)) is None
    driver.run()
    driver.check_answers()


# -- wasted rows ----------------------------------------------------------------------------------


def test_a_stop_token_leaves_one_row_in_vain_and_frees_everything_behind_it() -> None:
    """Its blocks and its slot are held as long as the later plan names them, no longer."""
    driver = PipelinedDriver(TWO)
    request, num_tokens = stopping_request()
    driver.submit(request)
    while 0 not in driver.answers.of[1].finished:
        driver.step()
    assert num_used(driver) > 0
    assert driver.begin() is None
    output = driver.end()
    assert not output.tokens
    assert num_used(driver) == 0
    assert not driver.scheduler.has_work
    driver.check_answers()
    assert sum(row.samples for plan in driver.plans for row in plan.rows) == num_tokens + 1


def test_the_slot_of_a_wasted_row_is_given_to_nobody_before_its_result() -> None:
    """The worker still computes in it; then it ends and starts in one plan."""
    driver = PipelinedDriver(replace(TWO, max_running=1))
    request, _ = stopping_request()
    driver.submit(request)
    driver.submit(make_request(2, prompt=range(40, 45)))
    while 0 not in driver.answers.of[1].finished:
        driver.step()
    assert driver.begin() is None
    driver.end()
    plan = driver.begin()
    assert plan is not None
    assert (plan.ended_slots, plan.starts[0].slot) == ((0,), 0)
    driver.run()
    driver.check_answers()
    driver.check_idle()


def test_an_abort_keeps_blocks_until_the_last_plan_that_names_them() -> None:
    """Two results are dropped; then all is free."""
    driver = PipelinedDriver(TWO)
    driver.submit(make_request(1, [7] * 20))
    begin_two(driver)
    held = num_used(driver)
    driver.abort(1)
    assert driver.scheduler.has_work
    driver.end()
    assert num_used(driver) == held
    assert driver.begin() is None
    driver.end()
    assert num_used(driver) == 0
    driver.check_idle()


@pytest.mark.parametrize("num_steps", range(6))
@pytest.mark.parametrize("num_begun", range(2))
def test_an_abort_at_any_phase_frees_all_blocks(num_steps: int, num_begun: int) -> None:
    """Waiting, held, in the prompt, decoding; with one or two plans open, or none."""
    driver = PipelinedDriver(replace(TWO, max_step_tokens=8, max_running=2))
    driver.submit(make_request(1, [7] * 20, 8, [ChoiceStart(i) for i in range(3)]))
    driver.submit(make_request(2, [8] * 20))
    for _ in range(num_steps):
        driver.step()
    for _ in range(num_begun):
        driver.begin()
    driver.abort(1)
    driver.abort(2)
    driver.run()
    assert num_used(driver) == 0
    driver.check_idle()


def test_a_row_that_fails_takes_the_one_behind_it_along_and_nobody_else() -> None:
    """Told once, as what failed first; its blocks are free once both plans are done."""

    def fail(row: RowPlan, context: Sequence[int]) -> str | None:
        return "NaN logits" if context[0] == 66 and len(context) == 12 else None

    driver = PipelinedDriver(TWO, fail_rows=fail)
    driver.submit(make_request(1))
    driver.submit(make_request(2, [66] * 10, choices=[ChoiceStart(0), ChoiceStart(1)]))
    driver.run()
    failed = [event for output in driver.outputs for event in output.failed]
    assert [(event.request_id, event.message) for event in failed] == [(2, "NaN logits")]
    driver.check_answers()
    driver.check_idle()


# -- what waits -----------------------------------------------------------------------------------


def test_nobody_is_preempted_who_is_in_an_open_plan() -> None:
    """Where blocks are short no plan follows; with none open somebody goes, as ever."""
    driver = PipelinedDriver(replace(TWO, num_blocks=10))
    for request_id in (1, 2, 3):
        driver.submit(make_request(request_id, prompt=[request_id + 10] * 8, max_tokens=16))
    num_waits = 0
    while driver.scheduler.has_work:
        num_open, before = driver.device.num_begun, driver.scheduler.load(0.0).num_preemptions
        plan = driver.begin()
        if driver.scheduler.load(0.0).num_preemptions > before:
            assert num_open == 0
        if plan is None:
            num_waits += num_open == 1
            driver.end()
    assert num_waits > 0
    assert driver.scheduler.load(0.0).num_preemptions > 0
    driver.check_answers()
    driver.check_idle()


def test_a_choice_with_drafts_waits_for_its_result_and_the_batch_with_it() -> None:
    """What follows is guessed behind known tokens; and all rows stay in one step."""
    driver = PipelinedDriver(replace(TWO, speculation=SpeculationConfig("draft-model", 5, "small")))
    driver.fake.propose = right_draft_model(driver)
    driver.submit(make_request(1, max_tokens=12))
    plain = make_request(2, max_tokens=12)
    driver.submit(replace(plain, speculation=Speculation.OFF))
    while 0 not in driver.answers.of[1].finished:
        plan = driver.begin()
        assert plan is not None
        assert len(plan.rows) == 2
        assert driver.begin() is None
        driver.end()
    driver.run()
    driver.check_answers()
    load = driver.scheduler.load(0.0)
    assert load.num_accepted_tokens == load.num_drafted_tokens > 5


def test_who_has_no_drafts_is_pipelined_again_once_those_with_drafts_are_gone() -> None:
    """The wait is theirs alone."""
    driver = PipelinedDriver(replace(TWO, speculation=LOOKUP))
    driver.submit(make_request(1, prompt=[5, 6, 7] * 4, max_tokens=3))
    driver.submit(replace(make_request(2, max_tokens=30), speculation=Speculation.OFF))
    while 0 not in driver.answers.of[1].finished:
        driver.step()
    begin_two(driver)
    driver.run()
    driver.check_answers()


def test_no_step_begins_behind_copies_alone() -> None:
    """That plan takes as long as a copy; who comes meanwhile starts once it is over."""
    driver = PipelinedDriver(replace(LIMITS, max_plans_in_flight=2), copies=slow(IN))
    ask(driver, question(1, 0))
    fill(driver)
    driver.submit(question(2, 0))
    plan = driver.begin()
    assert plan is not None
    assert not plan.rows
    assert driver.scheduler.load(0.0).num_loading == 1
    driver.submit(make_request(3, range(60, 65)))
    assert driver.begin() is None
    driver.end()
    assert rows_of(driver.begin()) == [(1, 0, 5)]
    driver.run()
    driver.check_answers()


def test_no_window_is_open_while_a_plan_is() -> None:
    """What was begun is to be finished, whoever else may come."""
    batcher = BatcherConfig(max_queue_delay_ms=20.0, preferred_batch_size=8)
    sizes = CacheSizes(num_device_blocks=64, block_bytes=1024, kv_dtype="float32")
    scheduler = Scheduler(batcher, CacheConfig(block_size_tokens=4), SPEC, sizes)
    scheduler.add(make_request(1), 0.0)
    assert scheduler.seconds_to_wait(0.0) == 0.02
    assert scheduler.schedule(0.02) is not None
    scheduler.abort(1)
    scheduler.add(make_request(2), 0.02)
    assert scheduler.seconds_to_wait(0.02) == 0.0
