"""What fails, and what the rest of the batcher makes of it, while two plans are in flight."""

from dataclasses import replace

import pytest

from rillgate_server.core.request import ChoiceStart
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import CopyDirection
from tests.support.answers import EOS
from tests.support.engine import STEP_S, Driver, Limits, make_request
from tests.support.pipelined import TWO, PipelinedDriver, begin_two, num_used
from tests.support.tiers import IN, LIMITS, OUT, prompt, slow

# -- plans that fail ------------------------------------------------------------------------------


def crowd(driver: Driver) -> None:
    """Submit two that run and one that waits."""
    for request_id in (1, 2, 3):
        driver.submit(make_request(request_id, prompt=[request_id + 10] * 6))


def test_a_step_that_fails_takes_the_one_begun_behind_it_along() -> None:
    """The requests of both end, and their slots once more; who waits goes on."""
    driver = PipelinedDriver(replace(TWO, max_running=2))
    crowd(driver)
    driver.step()
    driver.begin()
    driver.loses_next_step = True
    driver.end()
    failures = [driver.answers.of[request_id].failure for request_id in (1, 2, 3)]
    assert failures[0] == failures[1] == "step 2 is lost"
    assert failures[2] is None
    assert num_used(driver) == 0
    plan = driver.begin()
    assert plan is not None
    assert set(plan.ended_slots) == {0, 1}
    driver.run()
    driver.check_answers()
    driver.check_idle()


def test_the_step_before_one_that_fails_keeps_its_tokens() -> None:
    """Its result came first."""
    driver = PipelinedDriver(replace(TWO, max_running=2))
    crowd(driver)
    begin_two(driver)
    driver.device.compute()
    driver.loses_next_step = True
    driver.end()
    assert [len(driver.answers.of[request_id].tokens[0]) for request_id in (1, 2)] == [1, 1]
    driver.end()
    assert driver.answers.of[1].failure == "step 2 is lost"
    driver.run()
    driver.check_answers()
    driver.check_idle()


def test_a_plan_that_is_refused_fails_the_step_before_it_too() -> None:
    """Its slots' starts and ends are said again, though the worker read nothing."""
    driver = PipelinedDriver(replace(TWO, max_running=2))
    crowd(driver)
    driver.begin()
    driver.loses_next_begin = True
    assert driver.begin() is None
    assert driver.answers.of[1].failure == "step 2 is refused"
    assert driver.device.num_begun == 0
    assert num_used(driver) == 0
    driver.run()
    driver.check_answers()
    driver.check_idle()


def test_slots_that_any_lost_plan_ended_are_ended_again() -> None:
    """The older of two that fail said it, and the worker may have raised before it read it."""
    driver = PipelinedDriver(replace(TWO, max_running=2))
    driver.submit(make_request(1, [7] * 8))
    driver.submit(make_request(2, [8] * 8, max_tokens=1))
    driver.begin()
    driver.end()
    first, second = begin_two(driver)
    assert (first.ended_slots, second.ended_slots) == ((1,), ())
    driver.loses_next_step = True
    driver.end()
    driver.submit(make_request(3))
    plan = driver.begin()
    assert plan is not None
    assert set(plan.ended_slots) == {0, 1}
    driver.run()
    driver.check_answers()


# -- the rest of the batcher ----------------------------------------------------------------------


@pytest.mark.parametrize("direction", [IN, OUT], ids=str)
def test_blocks_go_through_both_tiers_with_two_plans_in_flight(direction: CopyDirection) -> None:
    """Swapped out and loaded back under running steps, and every row reads what it must."""
    limits = replace(LIMITS, num_blocks=24, max_plans_in_flight=2)
    driver = PipelinedDriver(limits, copies=slow(direction, 3))
    request_id = 0
    for _ in range(3):
        for number in range(6):
            request_id += 1
            driver.submit(make_request(request_id, prompt(number), max_tokens=20))
        driver.run()
    driver.check_idle()
    driver.check_answers()
    load = driver.scheduler.load(0.0)
    assert load.copies.num_loaded_blocks > 0
    assert load.copies.num_stored_blocks > 0
    assert load.num_preemptions > 0


def test_later_choices_find_the_prompt_that_the_first_one_computes() -> None:
    """They wait for its result, not for its plan."""
    driver = PipelinedDriver(TWO)
    driver.submit(make_request(1, range(10, 30), choices=[ChoiceStart(i) for i in range(3)]))
    first, second = begin_two(driver)
    assert len(first.starts) == 1
    assert not second.starts
    driver.end()
    plan = driver.begin()
    assert plan is not None
    assert [row.start for row in plan.rows] == [21, 16, 16]
    driver.run()
    driver.check_answers()


def test_prompt_logprobs_come_from_chunks_of_overlapping_steps() -> None:
    """All positions, in order, once."""
    sampling = SamplingParams(seed=1, temperature=0.0, num_logprobs=2, num_prompt_logprobs=1)
    driver = PipelinedDriver(replace(TWO, max_step_tokens=8))
    driver.submit(make_request(1, range(10, 40), sampling=sampling))
    driver.run()
    driver.check_answers()
    told = driver.answers.of[1].prompt_logprobs
    assert told is not None
    assert len(told.positions) == 29


def test_two_plans_in_flight_give_the_answers_that_one_gives() -> None:
    """Tokens and finish reasons per request, whatever overlaps."""
    outcomes = []
    for limits in (Limits(num_blocks=30), Limits(num_blocks=30, max_plans_in_flight=2)):
        one = limits.max_plans_in_flight == 1
        driver = Driver(limits) if one else PipelinedDriver(limits)
        for request_id in range(1, 13):
            request = make_request(
                request_id,
                [request_id % 5 + 10] * (3 * request_id),
                max_tokens=20,
                sampling=SamplingParams(seed=request_id, temperature=1.0),
            )
            driver.submit(replace(request, stop_token_ids=frozenset({EOS})))
            driver.step()
        driver.run()
        driver.check_idle()
        outcomes.append(
            {
                request_id: (answer.tokens[0], answer.finished[0].reason)
                for request_id, answer in driver.answers.of.items()
            }
        )
    assert outcomes[0] == outcomes[1]
    assert len({reason for _, reason in outcomes[0].values()}) == 2


def test_what_two_steps_overlap_counts_once() -> None:
    """A step's seconds begin with the result before it: results come every STEP_S."""
    driver = PipelinedDriver(TWO)
    driver.submit(make_request(1, max_tokens=30))
    driver.run()
    load = driver.scheduler.load(0.0)
    assert load.decode_step_s == pytest.approx(STEP_S)
    assert load.prefill_tokens_per_s == pytest.approx(10 / STEP_S)


def test_an_output_says_the_step_that_it_is_of() -> None:
    """Not the one that has begun meanwhile."""
    driver = PipelinedDriver(TWO)
    driver.submit(make_request(1, max_tokens=4))
    driver.run()
    assert [output.step_id for output in driver.outputs] == [1, 2, 3, 4]
