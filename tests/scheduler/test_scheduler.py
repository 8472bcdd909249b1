"""The batcher, one promise at a time."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from rillgate_server.core.request import ChoiceStart, FinishReason
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import RowPlan, StepOutput, StepPlan, StepResult
from rillgate_server.errors import EngineFailure
from tests.support.answers import EOS, MODEL, reference_answer
from tests.support.engine import Driver, Limits, make_request


def streams_in(output: StepOutput | None) -> set[int]:
    """Return the requests that got a token."""
    return set() if output is None else {tokens.request_id for tokens in output.tokens}


def rows_of(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    """Return (slot, start, number of tokens) of each row."""
    assert plan is not None
    return [(row.slot, row.start, row.num_tokens) for row in plan.rows]


# -- forming a step -------------------------------------------------------------------------------


def test_a_plan_holds_prefill_chunks_and_decode_rows_at_once() -> None:
    """Decode rows come first; a long prompt enters beside them in chunks; nothing is padded."""
    driver = Driver(Limits(max_step_tokens=64, max_prefill_chunk_tokens=16))
    driver.submit(make_request(1, prompt=range(10, 14), max_tokens=20))
    driver.step()
    driver.submit(make_request(2, prompt=[7] * 40))
    plan = driver.begin()
    assert rows_of(plan) == [(0, 4, 1), (1, 0, 16)]
    assert plan is not None
    assert [row.samples for row in plan.rows] == [True, False]
    driver.end(plan)
    assert rows_of(driver.begin()) == [(0, 5, 1), (1, 16, 16)]


def test_running_streams_get_a_token_in_every_step_while_a_long_prompt_enters() -> None:
    """The gap between two tokens stays under two steps; here it is exactly one."""
    driver = Driver(Limits(num_blocks=200, max_step_tokens=64, max_prefill_chunk_tokens=16))
    for request_id in (1, 2, 3):
        driver.submit(make_request(request_id, prompt=[request_id] * 5, max_tokens=60))
    driver.step()
    driver.submit(make_request(4, prompt=[9] * 400, max_tokens=4))
    num_steps = 0
    while driver.answers.of[4].started is None or not driver.answers.of[4].tokens[0]:
        assert streams_in(driver.step()) >= {1, 2, 3}
        num_steps += 1
    assert num_steps == 400 // 16
    driver.run()
    driver.check_answers()


def test_without_decode_rows_a_prompt_takes_the_whole_budget() -> None:
    """The chunk limit protects running streams, and there are none."""
    driver = Driver(Limits(max_step_tokens=64, max_prefill_chunk_tokens=16))
    driver.submit(make_request(1, prompt=[7] * 100))
    assert rows_of(driver.begin()) == [(0, 0, 64)]


def test_prompts_share_the_budget_in_the_order_of_arrival() -> None:
    """The one that does not fit whole gets what is left, and goes on in the next step."""
    driver = Driver(Limits(max_step_tokens=32))
    for request_id, num_tokens in ((1, 12), (2, 12), (3, 12)):
        driver.submit(make_request(request_id, prompt=[request_id + 10] * num_tokens))
    plan = driver.begin()
    assert rows_of(plan) == [(0, 0, 12), (1, 0, 12), (2, 0, 8)]
    assert plan is not None
    assert streams_in(driver.end(plan)) == {1, 2}


def test_no_more_than_max_running_run_and_the_rest_start_in_order() -> None:
    """First come, first served, though a later request would be shorter."""
    driver = Driver(Limits(max_running=2, max_step_tokens=64))
    for request_id in range(6):
        driver.submit(make_request(request_id, prompt=[50 - request_id] * (12 - request_id)))
    started: list[int] = []
    while driver.scheduler.has_work:
        output = driver.step()
        started += [event.request_id for event in output.started] if output else []
        assert driver.scheduler.load(0.0).num_running <= 2
    assert started == list(range(6))
    driver.check_answers()


def test_only_one_plan_is_open_at_a_time() -> None:
    """Until its result is there, `schedule` gives nothing."""
    driver = Driver()
    driver.submit(make_request(1))
    plan = driver.begin()
    assert plan is not None
    assert driver.scheduler.schedule(0.0) is None
    driver.end(plan)
    assert driver.scheduler.schedule(0.0) is not None


# -- ends and continuation ------------------------------------------------------------------------


def request_with_stop() -> tuple[int, int]:
    """Return a seed whose answer ends with a stop id, and its length, at least 3."""
    for seed in range(1000):
        sampling = SamplingParams(seed=seed, temperature=1.0)
        request = make_request(1, max_tokens=40, sampling=sampling)
        tokens, reason = reference_answer(
            replace(request, stop_token_ids=frozenset({EOS})), ChoiceStart(0)
        )
        if reason is FinishReason.STOP and len(tokens) >= 3:
            return seed, len(tokens)
    raise AssertionError("no such seed")


@pytest.mark.parametrize(
    ("max_tokens_less", "min_tokens_more", "reason"),
    [(0, 0, FinishReason.STOP), (1, 0, FinishReason.LENGTH), (-5, 1, FinishReason.LENGTH)],
)
def test_a_choice_ends_on_a_stop_id_or_at_max_tokens(
    max_tokens_less: int, min_tokens_more: int, reason: FinishReason
) -> None:
    """A stop id does not count before min_tokens."""
    seed, num_tokens = request_with_stop()
    sampling = SamplingParams(seed=seed, min_tokens=num_tokens + min_tokens_more)
    max_tokens = num_tokens - max_tokens_less
    sampling = replace(sampling, min_tokens=min(sampling.min_tokens, max_tokens))
    driver = Driver()
    request = make_request(1, max_tokens=max_tokens, sampling=sampling)
    driver.submit(replace(request, stop_token_ids=frozenset({EOS})))
    driver.run()
    finished = driver.answers.of[1].finished[0]
    assert finished.reason is reason
    assert finished.num_tokens == (num_tokens if reason is FinishReason.STOP else max_tokens)


def test_a_continuation_replays_in_chunks_and_gives_only_what_is_new() -> None:
    """The offset counts the given tokens, and the whole answer is that of one go."""
    driver = Driver(Limits(max_step_tokens=8))
    fresh = make_request(1, max_tokens=30)
    whole, _ = reference_answer(fresh, ChoiceStart(0))
    driver.submit(replace(fresh, choices=(ChoiceStart(0, whole[:21]),)))
    driver.run()
    first = driver.outputs[3].tokens[0]
    assert [len(output.tokens) for output in driver.outputs[:4]] == [0, 0, 0, 1]
    assert (first.token_offset, first.token_ids) == (21, whole[21:22])
    assert tuple(driver.answers.of[1].tokens[0]) == whole


def test_given_tokens_that_end_the_choice_finish_it_without_a_step() -> None:
    """max_tokens reached, or a stop id at the end with min_tokens met: nothing is computed."""
    driver = Driver()
    by_length = make_request(1, max_tokens=3, choices=(ChoiceStart(0, (5, 6, 7)),))
    by_stop = make_request(2, max_tokens=9, choices=(ChoiceStart(0, (5, EOS)),))
    driver.submit(by_length)
    driver.submit(replace(by_stop, stop_token_ids=frozenset({EOS})))
    assert driver.scheduler.has_work
    assert driver.step() is None
    assert not driver.plans
    reasons = [driver.answers.of[request_id].finished[0].reason for request_id in (1, 2)]
    assert reasons == [FinishReason.LENGTH, FinishReason.STOP]
    assert not driver.scheduler.has_work


def test_a_given_stop_id_before_min_tokens_does_not_end_the_choice() -> None:
    """It was drawn under the same rule, so the answer goes on."""
    sampling = SamplingParams(seed=1, min_tokens=5, banned_until_min_tokens=(EOS,))
    request = make_request(1, max_tokens=9, choices=(ChoiceStart(0, (5, EOS)),), sampling=sampling)
    driver = Driver()
    driver.submit(replace(request, stop_token_ids=frozenset({EOS})))
    driver.run()
    driver.check_answers()
    assert driver.answers.of[1].finished[0].num_tokens > 4


def test_a_choice_that_is_already_done_is_told_with_the_others_start() -> None:
    """`started` is first, whatever the choices; the done one takes no slot."""
    driver = Driver()
    choices = (ChoiceStart(0, (5,) * 8), ChoiceStart(1))
    driver.submit(make_request(1, choices=choices))
    driver.run()
    driver.check_answers()
    assert [event.choice_index for event in driver.outputs[0].finished] == [0]


# -- aborts and faults ----------------------------------------------------------------------------


def test_an_abort_frees_blocks_at_each_phase() -> None:
    """Waiting, held, half-way through the prompt, decoding: free before the next step."""
    for num_steps in range(6):
        driver = Driver(Limits(max_step_tokens=8, max_running=2))
        driver.submit(make_request(1, [7] * 20, 8, [ChoiceStart(i) for i in range(3)]))
        driver.submit(make_request(2, [8] * 20))
        for _ in range(num_steps):
            driver.step()
        driver.abort(1)
        driver.abort(2)
        driver.check_idle()
        assert not driver.scheduler.has_work


def test_an_abort_during_a_step_keeps_its_blocks_until_the_result() -> None:
    """A block that an open plan names is never free; the late result is dropped."""
    driver = Driver()
    driver.submit(make_request(1, [7] * 20))
    plan = driver.begin()
    assert plan is not None
    driver.abort(1)
    assert driver.scheduler.load(0.0).device.num_blocks_used == 5
    output = driver.end(plan)
    assert output == StepOutput(plan.step_id)
    driver.check_idle()


def test_an_abort_names_choices_and_leaves_the_others() -> None:
    """The request lives while one choice does."""
    driver = Driver()
    driver.submit(make_request(1, choices=[ChoiceStart(i) for i in range(3)]))
    driver.step()
    driver.step()
    driver.abort(1, (0, 2))
    driver.scheduler.abort(77)
    driver.run()
    driver.check_answers()
    assert driver.answers.of[1].finished.keys() == {1}


def test_a_failed_row_ends_its_request_alone() -> None:
    """All of its choices end, neighbours in the same batch keep their answers."""

    def fail(row: RowPlan, context: Sequence[int]) -> str | None:
        return "NaN logits" if context[0] == 66 and len(context) == 12 else None

    driver = Driver(fail_rows=fail)
    driver.submit(make_request(1))
    driver.submit(make_request(2, [66] * 10, choices=[ChoiceStart(0), ChoiceStart(1)]))
    driver.submit(make_request(3))
    driver.run()
    assert driver.answers.of[2].failure == "NaN logits"
    driver.check_answers()
    driver.check_idle()


def test_a_step_that_never_returns_fails_its_requests_and_frees_them() -> None:
    """`fail_plan` stands for the result; requests outside the plan go on."""
    driver = Driver(Limits(max_step_tokens=8))
    driver.submit(make_request(1, [7] * 8))
    driver.submit(make_request(2, [8] * 8))
    driver.begin()
    driver.answers.take(driver.scheduler.fail_plan("lost", 0.0))
    driver.scheduler.check_integrity()
    assert driver.answers.of[1].failure == "lost"
    driver.run()
    driver.check_answers()
    driver.check_idle()


def test_slots_that_a_lost_plan_ended_are_ended_again_by_the_next() -> None:
    """The executor may have raised before it read them, and another choice gets the slot."""
    driver = Driver(Limits(max_running=2))
    driver.submit(make_request(1, [7] * 8))
    driver.submit(make_request(2, [8] * 8, max_tokens=1))
    driver.step()
    lost = driver.begin()
    assert lost is not None
    assert lost.ended_slots == (1,)
    driver.answers.take(driver.scheduler.fail_plan("lost", 0.0))
    for request_id in (3, 4):
        driver.submit(make_request(request_id, [request_id] * 8))
    plan = driver.begin()
    assert plan is not None
    assert set(plan.ended_slots) == {0, 1}
    driver.end(plan)
    driver.run()
    driver.check_answers()


@pytest.mark.parametrize(
    "change",
    [{"step_id": 9}, {"token_ids": ()}, {"token_ids": ((),)}, {"token_ids": ((1, 2),)}],
    ids=str,
)
def test_a_result_that_does_not_fit_its_plan_changes_nothing(change: dict[str, object]) -> None:
    """It is our own bug; the right result can still be applied."""
    driver = Driver()
    driver.submit(make_request(1))
    plan = driver.begin()
    assert plan is not None
    result = driver.executor.execute(plan)
    wrong: StepResult = replace(result, **change)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(EngineFailure):
        driver.scheduler.update(wrong, 0.0)
    driver.apply(result)
    driver.run()
    driver.check_answers()


def test_the_load_counts_what_runs_and_what_waits() -> None:
    """Choices, tokens and blocks, after each step."""
    driver = Driver(Limits(max_step_tokens=8, max_running=1))
    driver.submit(make_request(1, [7] * 12, 4))
    driver.submit(make_request(2, [8] * 5, 4, [ChoiceStart(0), ChoiceStart(1)]))
    driver.step()
    driver.clock.advance(3.0)
    load = driver.scheduler.load(driver.clock.now())
    assert (load.step_id, load.num_running, load.num_waiting) == (1, 1, 2)
    assert (load.num_running_tokens, load.num_waiting_tokens) == (8, 4 + 5)
    assert load.step_age_s == pytest.approx(3.0)
    assert load.device.num_blocks_used == 3
    driver.run()
    assert driver.scheduler.load(99.0).step_age_s == 0.0


def test_the_model_is_not_a_constant() -> None:
    """Another context gives another token, else these tests could not fail."""
    sampling = SamplingParams(seed=1, temperature=0.0)
    drawn = {MODEL.next_token([7, i], 2, sampling, 0) for i in range(50)}
    assert len(drawn) > 25


def test_the_load_says_what_share_of_the_device_no_request_uses() -> None:
    """Cached blocks count as free: they are given up for whoever comes."""
    driver = Driver(Limits(num_blocks=8))
    driver.submit(make_request(1, prompt=range(10, 23), max_tokens=2))
    driver.step()
    load = driver.scheduler.load(driver.clock.now())
    assert load.device.num_blocks_used == 4
    assert load.free_device_fraction == 0.5
    driver.run()
    load = driver.scheduler.load(driver.clock.now())
    assert load.device.num_blocks_cached == 3
    assert load.free_device_fraction == 1.0
