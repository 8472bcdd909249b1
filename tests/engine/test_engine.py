"""One step, from schedule to output."""

import logging

import pytest

from rillgate_server.core.clock import VirtualClock
from rillgate_server.core.step import StepOutput, StepPlan
from rillgate_server.engine.engine import Engine
from rillgate_server.engine.testing import FakeCopies, FakeExecutor
from tests.support.answers import MODEL, Answers, reference_answer
from tests.support.engine import Limits, make_request


def test_steps_lead_from_a_request_to_its_answer() -> None:
    """Step by step, with the executor's time on the injected clock."""
    limits, clock = Limits(), VirtualClock()

    def wait(plan: StepPlan) -> None:
        clock.advance(0.25 if plan.step_id > 1 else 2.0)

    scheduler = limits.make_scheduler()
    executor = FakeExecutor(limits.num_blocks, limits.block_size_tokens, MODEL, before_step=wait)
    engine = Engine(scheduler, executor, clock)
    assert engine.step() is None
    request, answers = make_request(1), Answers()
    answers.expect(request)
    assert scheduler.add(request, clock.now()) is None
    outputs: list[StepOutput] = []
    while (output := engine.step()) is not None:
        answers.take(output)
        outputs.append(output)
    assert tuple(answers.of[1].tokens[0]) == reference_answer(request, request.choices[0])[0]
    assert [output.step_id for output in outputs] == list(range(1, 9))
    load = scheduler.load(clock.now())
    assert load.prefill_tokens_per_s == pytest.approx(10 / 2.0)
    assert load.decode_step_s == pytest.approx(0.25)


def test_a_copy_that_fails_is_logged_without_what_it_holds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An operator sees that a tier loses blocks; the request is answered all the same."""
    limits, clock = Limits(num_blocks=8, num_host_blocks=32, load_policy="load"), VirtualClock()
    scheduler = limits.make_scheduler()
    broken = FakeCopies(fail_copies=lambda job: tuple(range(len(job.pairs))))
    engine = Engine(scheduler, limits.make_executor(MODEL, broken), clock)
    answers = Answers()
    with caplog.at_level(logging.WARNING):
        for request_id, first in ((1, 10), (2, 40), (3, 10)):
            request = make_request(request_id, prompt=range(first, first + 20))
            answers.expect(request)
            assert scheduler.add(request, clock.now()) is None
            while scheduler.has_work and len(caplog.records) < 50:
                answers.take(engine.step() or StepOutput(0))
            expected = reference_answer(request, request.choices[0])[0]
            assert tuple(answers.of[request_id].tokens[0]) == expected
            if scheduler.load(clock.now()).copies.num_failed_blocks:
                break
    assert caplog.records[0].getMessage().startswith("copy 1 between the cache's tiers: ")
