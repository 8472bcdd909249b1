"""Whose blocks stay, who may share them, and who comes back to them: the rules of both tiers."""

from dataclasses import replace

import pytest

from rillgate_server.core.step import CopyDirection
from rillgate_server.engine.testing import FakeCopies
from tests.support.engine import Driver, make_request
from tests.support.tiers import (
    LIMITS,
    NUM_HIT_TOKENS,
    SIZE,
    ask,
    fill,
    found,
    in_host_tier,
    load_of,
    question,
    step_until,
    with_copy_in_flight,
)

SALT = bytes(range(16))


# -- eviction -------------------------------------------------------------------------------------


def test_the_device_tier_evicts_what_was_used_longest_ago_and_ends_before_beginnings() -> None:
    """One block is needed: the last of the oldest prompt goes."""
    driver = Driver(replace(LIMITS, num_host_blocks=0))
    for number in range(5):
        ask(driver, question(number, number))
    ask(driver, question(5, 0))  # now prompt 1 is the oldest
    ask(driver, make_request(6, [9] * 7, 1))  # 2 blocks, 1 is free
    assert load_of(driver).device.num_evicted_blocks == 1
    assert found(driver, question(7, 0)) == (NUM_HIT_TOKENS, 0)
    assert found(driver, question(8, 1)) == (8, 0)


def test_the_host_tier_evicts_what_was_stored_or_loaded_longest_ago() -> None:
    """Room for eight prompts of twelve: the first is kept, for it was loaded between."""
    driver = Driver(replace(LIMITS, num_host_blocks=24))
    fill(driver, range(7))
    assert found(driver, question(100, 0)) == (0, NUM_HIT_TOKENS)
    fill(driver, range(7, 12))
    assert load_of(driver).host.num_evicted_blocks == 12
    assert found(driver, question(101, 0)) == (0, NUM_HIT_TOKENS)
    assert found(driver, question(102, 1)) == (0, 0)


def test_the_host_tier_evicts_ends_before_beginnings() -> None:
    """Room for five prompts and a block: of the sixth last its beginning is left."""
    left = []
    for number in range(12):
        driver = Driver(replace(LIMITS, num_host_blocks=16))
        fill(driver, range(12))
        left.append(sum(found(driver, question(1, number))))
    assert left == [0] * 6 + [SIZE] + [NUM_HIT_TOKENS] * 5


# -- who may share --------------------------------------------------------------------------------


def test_salts_share_nothing_in_either_tier() -> None:
    """The same prompt of another tenant is computed; of the same tenant it is found."""
    driver = Driver(LIMITS)
    salted = replace(question(1, 0), cache_salt=SALT)
    ask(driver, salted)
    assert found(driver, question(2, 0)) == (0, 0)
    assert found(driver, replace(salted, request_id=3)) == (NUM_HIT_TOKENS, 0)
    fill(driver)
    other = bytes(reversed(SALT))
    assert found(driver, replace(salted, request_id=4, cache_salt=other)) == (0, 0)
    assert found(driver, replace(salted, request_id=5)) == (0, NUM_HIT_TOKENS)


def test_a_declared_prefix_is_shared_across_salts_in_both_tiers() -> None:
    """Blocks wholly inside it, and not the one that it ends in."""
    driver = Driver(LIMITS)
    declared = replace(question(1, 0), cache_salt=SALT, num_shared_prefix_tokens=11)
    other = replace(declared, cache_salt=bytes(reversed(SALT)))
    ask(driver, declared)
    assert found(driver, replace(other, request_id=2)) == (8, 0)
    fill(driver)
    third = replace(declared, cache_salt=bytes(15) + b"x")
    assert found(driver, replace(third, request_id=3)) == (0, 8)
    undeclared = replace(third, num_shared_prefix_tokens=0, cache_salt=bytes(15) + b"y")
    assert found(driver, replace(undeclared, request_id=4)) == (0, 0)


# -- preemption -----------------------------------------------------------------------------------


def run_crowded(load_policy: str) -> Driver:
    """Let six requests grow together over room for two."""
    limits = replace(LIMITS, num_blocks=24, max_running=6, load_policy=load_policy)
    driver = Driver(limits, copies=FakeCopies(copy_steps=lambda job: job.copy_id % 3))
    for number in range(6):
        driver.submit(question(number, number, max_tokens=30))
    driver.run()
    driver.check_answers()
    driver.check_idle()
    return driver


def test_swapped_and_recomputed_choices_go_on_with_the_same_tokens() -> None:
    """Both ways are taken, and no answer shows which."""
    swapped, recomputed = run_crowded("load"), run_crowded("recompute")
    for driver, is_swap in ((swapped, True), (recomputed, False)):
        load = load_of(driver)
        assert load.num_preemptions > 0
        assert load.decisions.num_swap_preemptions == (load.num_preemptions if is_swap else 0)
        assert load.decisions.num_recompute_preemptions == (0 if is_swap else load.num_preemptions)
    assert load_of(swapped).copies.num_loaded_blocks > 0
    assert not any(plan.copies for plan in recomputed.plans)
    answers = [{i: a.tokens for i, a in d.answers.of.items()} for d in (swapped, recomputed)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("num_spared", range(4))
@pytest.mark.parametrize("is_loading", [False, True])
def test_swapped_requests_may_be_aborted_at_any_time(num_spared: int, is_loading: bool) -> None:
    """While they wait and while they load: nothing of them is left, the others go on."""
    limits = replace(LIMITS, num_blocks=24, max_running=6)
    driver = Driver(limits, copies=FakeCopies(copy_steps=lambda job: 4))
    for number in range(6):
        driver.submit(question(number, number, max_tokens=30))
    step_until(driver, lambda: load_of(driver).num_preemptions > 0)
    if is_loading:
        step_until(driver, lambda: load_of(driver).num_loading > 0)
    for request_id in (5, 4, 3, 2)[num_spared:]:
        driver.abort(request_id)
    driver.run()
    driver.check_answers()
    driver.check_idle()


# -- flush ----------------------------------------------------------------------------------------


def test_a_flush_forgets_both_tiers() -> None:
    """Everything is free, the numbers say how much it was, and the next one computes."""
    driver = in_host_tier()
    before = load_of(driver)
    flushed = driver.scheduler.flush_cache()
    assert flushed.num_device_blocks == before.device.num_blocks_cached > 0
    assert flushed.num_host_blocks == before.host.num_blocks_cached > 0
    load = load_of(driver)
    assert load.device.num_blocks_free == load.device.num_blocks
    assert load.host.num_blocks_free == load.host.num_blocks
    assert found(driver, question(2, 0)) == (0, 0)


def test_a_flush_leaves_what_is_used() -> None:
    """A running request goes on, and shares its blocks as before."""
    driver = Driver(LIMITS)
    driver.submit(question(1, 0, max_tokens=12))
    driver.step()
    driver.flush()
    driver.submit(question(2, 0))
    driver.run()
    driver.check_answers()
    started = driver.answers.of[2].started
    assert started is not None
    assert started.num_cached_tokens == NUM_HIT_TOKENS


@pytest.mark.parametrize("direction", CopyDirection)
def test_a_flush_during_a_copy_lets_it_end_and_keeps_nothing(direction: CopyDirection) -> None:
    """What a copy alone holds is forgotten at once, and free when it ends."""
    driver = with_copy_in_flight(direction)
    for request_id in range(100, 105):
        driver.abort(request_id)
    driver.flush()
    driver.check_idle()
    load = load_of(driver)
    assert load.device.num_blocks_free == load.device.num_blocks
    assert load.host.num_blocks_free == load.host.num_blocks
    assert found(driver, question(200, 0)) == (0, 0)
