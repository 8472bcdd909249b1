"""Refusals: at once, for good, and with the numbers."""

from dataclasses import replace

import pytest

from rillgate_server.core.request import (
    ChoiceStart,
    PriorityClass,
    Rejection,
    RejectReason,
    Request,
    Tenant,
)
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
    (
        replace(make_request(1), num_shared_prefix_tokens=11),
        "shared_prefix_tokens is 11; allowed: 0",
    ),
    (replace(make_request(1), num_shared_prefix_tokens=-1), "is -1; allowed: 0 to 10"),
    (replace(make_request(1), tenant=Tenant("é" * 129)), "tenant is 258 bytes; allowed: 256 bytes"),
    (replace(make_request(1), tenant=Tenant(weight=0.0)), "tenant_weight is 0.0; allowed: above 0"),
    (replace(make_request(1), tenant=Tenant(weight=float("nan"))), "tenant_weight is nan"),
    (replace(make_request(1), tenant=Tenant(weight=2e6)), "tenant_weight is 2000000.0; allowed"),
    (replace(make_request(1), deadline_s=float("inf")), "deadline is inf; allowed: a finite time"),
    (replace(make_request(1), arrival_s=float("-inf")), "arrival is -inf; allowed: a finite time"),
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
    driver.scheduler.drain(undo=True)
    assert driver.submit(make_request(4)) is None
    assert not driver.scheduler.load(0.0).is_draining


# -- deadlines ----------------------------------------------------------------------------------


def measured_driver(max_waiting_requests: int = 100, *, prefix_caching: bool = False) -> Driver:
    """Build a driver that has computed enough for prefill to cost 800 tokens a second."""
    limits = Limits(
        max_step_tokens=8,
        max_running=1,
        prefix_caching=prefix_caching,
        max_waiting_requests=max_waiting_requests,
    )
    driver = Driver(limits)
    for request_id in range(1000, 1010):
        prompt = [request_id - 990, *range(11, 26)]
        driver.submit(make_request(request_id, prompt=prompt, max_tokens=1))
    driver.run()
    assert driver.scheduler.load(0.0).prefill_tokens_per_s == pytest.approx(800, rel=0.01)
    return driver


def due(request: Request, driver: Driver, seconds: float) -> Request:
    """Give a request a deadline so many seconds from now."""
    now = driver.clock.now()
    return replace(request, arrival_s=now, deadline_s=now + seconds)


def test_a_deadline_that_is_too_soon_even_alone_is_refused_for_good() -> None:
    """It says the prefill's predicted time and the time left, in milliseconds."""
    driver = measured_driver()
    request = make_request(1, prompt=[5] * 160)  # 20 steps of 10 ms
    rejection = refused(driver, due(request, driver, 0.15))
    assert rejection.reason is RejectReason.DEADLINE_NEVER
    assert rejection.predicted_ttft_s == pytest.approx(0.2, rel=0.05)
    assert rejection.asked == pytest.approx(200, rel=0.05)
    assert rejection.free == 150
    assert rejection.retry_after_s == 0.0, "no retry can help"
    assert str(rejection.asked) in rejection.message
    assert "150 ms" in rejection.message
    assert not driver.scheduler.has_work, "it was never queued"
    assert driver.submit(due(request, driver, 0.25)) is None


def test_an_idle_replica_tries_now_and_then_what_it_would_refuse() -> None:
    """Else costs that were measured in a bad hour would refuse everybody for ever."""
    driver = measured_driver()
    request = due(make_request(1, prompt=[5] * 160), driver, 0.15)
    assert refused(driver, request).reason is RejectReason.DEADLINE_NEVER
    driver.clock.advance(10.0)
    assert driver.submit(due(request, driver, 0.15)) is None
    late = due(make_request(2, prompt=[5] * 160), driver, 0.15)
    assert refused(driver, late).reason is RejectReason.DEADLINE_NEVER, "one at a time"
    driver.run()
    driver.clock.advance(10.0)
    over = replace(late, deadline_s=driver.clock.now())
    assert refused(driver, over).reason is RejectReason.DEADLINE_NEVER, "a deadline that is over"


def test_a_replica_that_only_decodes_tries_too() -> None:
    """Prefill costs grow old while one long answer runs."""
    driver = measured_driver()
    driver.submit(make_request(1, prompt=[5] * 8, max_tokens=400))
    for _ in range(3):
        driver.step()
    request = make_request(2, prompt=[5] * 160)
    assert refused(driver, due(request, driver, 0.15)).reason is RejectReason.DEADLINE_NEVER
    driver.clock.advance(10.0)
    assert driver.submit(due(request, driver, 0.15)) is None


def test_what_the_cache_holds_is_not_counted_against_a_deadline() -> None:
    """A prompt that was computed before needs its last block alone; another salt needs all."""
    driver = measured_driver(prefix_caching=True)
    prompt = [7] * 160
    driver.submit(make_request(1, prompt=prompt, max_tokens=1))
    driver.run()
    request = due(make_request(2, prompt=prompt), driver, 0.05)
    stranger = replace(request, request_id=3, cache_salt=bytes(range(16)))
    assert refused(driver, stranger).reason is RejectReason.DEADLINE_NEVER
    assert driver.submit(request) is None


def test_what_a_request_has_waited_already_is_load() -> None:
    """It could have been in time on an idle replica: a retry, here or elsewhere, can help."""
    driver = measured_driver()
    request = due(make_request(1, prompt=[5] * 160), driver, 0.25)  # 0.2 s alone
    driver.clock.advance(0.1)
    rejection = refused(driver, request)
    assert rejection.reason is RejectReason.DEADLINE_NOW
    assert rejection.predicted_ttft_s == pytest.approx(0.2, rel=0.05)
    assert rejection.free == 150
    assert rejection.retry_after_s > 0.0


def test_a_deadline_that_is_too_soon_behind_what_waits_is_refused_now() -> None:
    """It was never queued, and may be tried again when so much less is ahead."""
    driver = measured_driver()
    for request_id in range(1, 11):
        # one second in all; of its own class it would go before them
        ahead = make_request(request_id, prompt=[5] * 80)
        driver.submit(replace(ahead, priority=PriorityClass.HIGH))
    before = driver.scheduler.load(driver.clock.now())
    request = make_request(50, prompt=[5] * 80)
    rejection = refused(driver, due(request, driver, 0.6))
    assert rejection.reason is RejectReason.DEADLINE_NOW
    assert rejection.predicted_ttft_s == pytest.approx(1.1, rel=0.05)
    assert rejection.asked == pytest.approx(1100, rel=0.05)
    assert rejection.free == 600
    assert rejection.retry_after_s == pytest.approx(0.5, rel=0.1)
    after = driver.scheduler.load(driver.clock.now())
    assert after == before, "it was never queued"
    assert driver.submit(due(request, driver, 1.2)) is None


def test_a_deadline_counts_only_what_goes_before_it() -> None:
    """Another tenant's flood only up to its share, and its own requests that are due later not."""
    driver = measured_driver()
    flood = Tenant("flood")
    for request_id in range(1, 21):
        driver.submit(replace(make_request(request_id, prompt=[5] * 80), tenant=flood))
    own = Tenant("own")
    driver.submit(replace(due(make_request(50, prompt=[5] * 80), driver, 9.0), tenant=own))
    request = replace(due(make_request(51, prompt=[5] * 80), driver, 0.25), tenant=own)
    assert driver.submit(request) is None, "0.1 s of the flood, and its own"
    request = replace(due(make_request(52, prompt=[5] * 80), driver, 0.35), tenant=own)
    assert refused(driver, request).predicted_ttft_s == pytest.approx(0.4, rel=0.05)
    driver = measured_driver()
    driver.submit(replace(make_request(1, prompt=[5] * 160), priority=PriorityClass.LOW))
    assert driver.submit(due(make_request(2, prompt=[5] * 80), driver, 0.15)) is None


def test_while_nothing_is_measured_only_a_deadline_that_is_over_is_refused() -> None:
    """A guess must not cost anybody an answer."""
    driver = Driver()
    rejection = refused(driver, due(make_request(1), driver, 0.0))
    assert rejection.reason is RejectReason.DEADLINE_NEVER
    assert not driver.scheduler.has_work
    assert driver.submit(due(make_request(1), driver, 1e-6)) is None


def test_a_full_queue_answers_with_the_predicted_wait() -> None:
    """When one must have left it, and what the time to the first token would have been."""
    driver = measured_driver(max_waiting_requests=4)
    for request_id in range(1, 5):
        driver.submit(make_request(request_id, prompt=[5] * 80))
    rejection = refused(driver, make_request(5, prompt=[5] * 80))
    assert rejection.reason is RejectReason.OVERLOADED
    assert rejection.retry_after_s == pytest.approx(0.1, rel=0.05)
    assert rejection.predicted_ttft_s == pytest.approx(0.5, rel=0.05)
