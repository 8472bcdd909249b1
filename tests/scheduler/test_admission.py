"""Refusals: at once, for good, and with the numbers."""

from dataclasses import replace

import pytest

from rillgate_server.core.request import ChoiceStart, Rejection, RejectReason, Request
from rillgate_server.core.sampling_params import SamplingParams
from tests.support.engine import SPEC, Driver, Limits, make_request


def refused(driver: Driver, request: Request) -> Rejection:
    """Submit a request that must be refused."""
    rejection = driver.submit(request)
    assert rejection is not None
    return rejection


def with_sampling(**values: float) -> Request:
    """Build a request whose sampling differs from the default."""
    return replace(make_request(1), sampling=SamplingParams(seed=1, **values))  # type: ignore[arg-type]  # names of one type, chosen by the cases below


INVALID = [
    (make_request(1, prompt=()), "prompt_token_ids is empty; allowed: at least one token"),
    (make_request(1, prompt=(5, 100)), "prompt_token_ids[1] is 100; allowed: 0 to 99"),
    (make_request(1, prompt=(-1,)), "prompt_token_ids[0] is -1; allowed: 0 to 99"),
    (make_request(1, choices=()), "choices is empty; allowed: at least one choice"),
    (
        make_request(1, choices=(ChoiceStart(2), ChoiceStart(2))),
        "choices is [2, 2]; allowed: distinct indices from 0",
    ),
    (
        make_request(1, choices=(ChoiceStart(0, (3, 4, 100)),)),
        "choices[0].generated_token_ids[2] is 100; allowed: 0 to 99",
    ),
    (make_request(1, max_tokens=0), "max_tokens is 0; allowed: at least 1"),
    (replace(make_request(1), stop_token_ids=frozenset({100})), "stop_token_ids[0] is 100"),
    (replace(make_request(1), cache_salt=b"x"), "cache_salt is 1 bytes; allowed: 16 bytes"),
    (with_sampling(min_tokens=9), "min_tokens is 9; allowed: 0 to 8"),
    (with_sampling(temperature=float("nan")), "sampling.temperature is nan"),
    (with_sampling(top_p=0.0), "sampling.top_p is 0.0"),
]


@pytest.mark.parametrize(("request_", "message"), INVALID, ids=[message for _, message in INVALID])
def test_an_invalid_field_is_named_with_its_value_and_limit(
    request_: Request, message: str
) -> None:
    """Nothing that the worker could not take gets past the queue's door."""
    driver = Driver()
    rejection = refused(driver, request_)
    assert rejection.reason is RejectReason.INVALID
    assert message in rejection.message
    assert not driver.scheduler.has_work


def test_ids_that_are_banned_until_min_tokens_must_be_in_the_vocabulary() -> None:
    """The worker would index its logits with them."""
    sampling = SamplingParams(seed=1, banned_until_min_tokens=(100,))
    rejection = refused(Driver(), make_request(1, sampling=sampling))
    assert "banned_until_min_tokens[0] is 100; allowed: 0 to 99" in rejection.message


def test_a_request_longer_than_the_context_says_both_lengths() -> None:
    """Prompt and answer count together."""
    driver = Driver(Limits(num_blocks=1000))
    limit = SPEC.max_context_tokens
    rejection = refused(driver, make_request(1, prompt=[5] * (limit - 7), max_tokens=8))
    assert rejection.reason is RejectReason.TOO_LONG
    assert (rejection.asked, rejection.free, rejection.limit) == (limit + 1, 7, limit)
    assert f"{limit - 7} tokens" in rejection.message
    assert str(limit) in rejection.message
    assert driver.submit(make_request(2, prompt=[5] * (limit - 8), max_tokens=8)) is None


def test_a_request_that_the_whole_cache_cannot_hold_is_refused() -> None:
    """It says asked, free and limit; one block less fits, and runs to its end."""
    driver = Driver(Limits(num_blocks=8))
    rejection = refused(driver, make_request(1, prompt=range(10, 30), max_tokens=14))
    assert rejection.reason is RejectReason.TOO_LONG
    assert (rejection.asked, rejection.free, rejection.limit) == (9, 8, 8)
    assert driver.submit(make_request(2, prompt=range(10, 30), max_tokens=13)) is None
    driver.run()
    driver.check_answers()


def test_a_full_queue_refuses_with_its_numbers_and_when_to_come_back() -> None:
    """Without measurements it names a second; running requests do not count."""
    driver = Driver(Limits(max_running=1, max_step_tokens=8, max_waiting_requests=2))
    driver.submit(make_request(1))
    driver.step()
    for request_id in (2, 3):
        assert driver.submit(make_request(request_id)) is None
    rejection = refused(driver, make_request(4))
    assert rejection.reason is RejectReason.OVERLOADED
    assert (rejection.asked, rejection.free, rejection.limit) == (1, 0, 2)
    assert "2 requests wait" in rejection.message
    assert rejection.retry_after_s > 0
    driver.run()
    assert driver.submit(make_request(4)) is None


def test_a_queue_full_of_tokens_refuses_but_never_starves_a_large_request() -> None:
    """A prompt over the whole limit may wait alone."""
    driver = Driver(Limits(max_running=1, max_step_tokens=8, max_waiting_tokens=25))
    assert driver.submit(make_request(1, prompt=range(10, 40))) is None, "larger, but alone"
    rejection = refused(driver, make_request(2))
    assert rejection.reason is RejectReason.OVERLOADED
    assert (rejection.asked, rejection.free, rejection.limit) == (10, 0, 25)
    driver.step()  # the first one started
    assert driver.submit(make_request(2)) is None
    assert driver.submit(make_request(3)) is None
    assert refused(driver, make_request(4)).free == 5


def test_the_predicted_wait_follows_the_measured_rates() -> None:
    """One prompt must leave the queue (10 tokens at 800 a second) and one slot come free first."""
    driver = Driver(Limits(max_running=1, max_step_tokens=8, max_waiting_requests=1))
    driver.submit(make_request(1, prompt=range(10, 26), max_tokens=50))
    for _ in range(4):  # two prefill steps of 8 tokens in 10 ms, then two decode steps
        driver.step()
    load = driver.scheduler.load(driver.clock.now())
    assert load.prefill_tokens_per_s == pytest.approx(800)
    assert load.decode_step_s == pytest.approx(0.01)
    driver.submit(make_request(2))
    rejection = refused(driver, make_request(3))
    assert rejection.retry_after_s == pytest.approx(47 * 0.01 + 10 / 800)


def test_a_draining_scheduler_refuses_and_finishes_what_it_has() -> None:
    """Whoever was accepted gets the whole answer, waiting ones too."""
    driver = Driver(Limits(max_running=1, max_step_tokens=8))
    for request_id in (1, 2):
        driver.submit(make_request(request_id))
    driver.step()
    driver.scheduler.drain()
    rejection = refused(driver, make_request(3))
    assert (rejection.reason, rejection.retry_after_s > 0) == (RejectReason.DRAINING, True)
    assert driver.scheduler.load(0.0).is_draining
    driver.run()
    driver.check_answers()
