"""One step, from schedule to output."""

import pytest

from rillgate_server.core.clock import VirtualClock
from rillgate_server.core.step import StepOutput, StepPlan
from rillgate_server.engine.engine import Engine
from rillgate_server.engine.testing import FakeExecutor
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
