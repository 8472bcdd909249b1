"""Blocks that are shared, and blocks that run out."""

from collections.abc import Sequence
from dataclasses import replace

from rillgate_server.core.request import ChoiceStart
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import RowPlan, StepOutput
from rillgate_server.engine.testing import fake_logprobs
from tests.support.engine import Driver, Limits, make_request


def streams_in(output: StepOutput | None) -> set[int]:
    """Return the requests that got a token."""
    return set() if output is None else {tokens.request_id for tokens in output.tokens}


# -- preemption -----------------------------------------------------------------------------------


def test_when_blocks_run_out_the_last_arrived_gives_way_and_resumes_from_the_cache() -> None:
    """It is counted for its choice, its answer is whole, and it computes little again."""
    driver = Driver(Limits(num_blocks=10, block_size_tokens=4))
    for request_id in (1, 2):
        driver.submit(make_request(request_id, prompt=[request_id + 10] * 8, max_tokens=20))
    driver.run()
    driver.check_answers()
    finished = {r: driver.answers.of[r].finished[0] for r in (1, 2)}
    assert finished[1].num_preemptions == 0
    assert finished[2].num_preemptions >= 1
    restarts = [s for p in driver.plans for s in p.starts if len(s.token_ids) > 8]
    assert len(restarts) == finished[2].num_preemptions
    assert driver.scheduler.load(0.0).num_preemptions == len(restarts)


def test_a_lone_request_that_just_fits_always_finishes() -> None:
    """The pool has not one block to spare, and others wait behind."""
    driver = Driver(Limits(num_blocks=5, block_size_tokens=4, max_running=4))
    for request_id in range(4):
        prompt = [request_id + 10] * 9
        assert driver.submit(make_request(request_id, prompt, max_tokens=12)) is None
    driver.run()
    driver.check_answers()
    assert all(answer.finished for answer in driver.answers.of.values())


def test_a_newcomer_waits_while_it_would_take_the_room_to_grow() -> None:
    """It starts only where each running choice could still take a block: else it came in vain."""
    driver = Driver(Limits(num_blocks=6, block_size_tokens=4, max_running=4))
    driver.submit(make_request(1, prompt=[11] * 10, max_tokens=12))  # 3 blocks, grows to 6
    driver.step()
    driver.submit(make_request(2, prompt=[12] * 10, max_tokens=2))  # 3 blocks: none would be left
    for _ in range(3):
        assert streams_in(driver.step()) == {1}
    driver.run()
    assert driver.scheduler.load(0.0).num_preemptions == 0
    driver.check_answers()


# -- sharing --------------------------------------------------------------------------------------


def test_choices_share_their_prompts_blocks_and_differ_by_their_index() -> None:
    """Choices 2 to n start when the first has computed the prompt, and compute one token of it."""
    driver = Driver(Limits(max_step_tokens=8))
    sampling = SamplingParams(seed=5, temperature=1.0)
    choices = [ChoiceStart(i) for i in range(3)]
    driver.submit(make_request(1, [7] * 17, 4, choices, sampling))
    while not driver.answers.of[1].tokens[0]:
        assert len(driver.plans) < 4
        driver.step()
    assert [len(plan.starts) for plan in driver.plans] == [1, 0, 0]
    plan = driver.begin()
    assert plan is not None
    assert [start.choice_index for start in plan.starts] == [1, 2]
    shared = {start.block_table[:4] for start in plan.starts}
    assert len(shared) == 1, "four full blocks of the prompt are the same"
    assert [row.num_tokens for row in plan.rows] == [1, 1, 1]
    driver.end(plan)
    driver.run()
    driver.check_answers()
    assert len({tuple(tokens) for tokens in driver.answers.of[1].tokens.values()}) == 3


def test_another_choice_computes_the_prompt_when_the_first_is_aborted() -> None:
    """Nobody waits for a choice that is gone."""
    driver = Driver(Limits(max_step_tokens=8))
    driver.submit(make_request(1, [7] * 17, 4, [ChoiceStart(0), ChoiceStart(1), ChoiceStart(2)]))
    driver.step()
    driver.abort(1, (0,))
    driver.run()
    driver.check_answers()
    assert driver.answers.of[1].finished.keys() == {1, 2}


def test_the_number_of_cached_prompt_tokens_is_reported() -> None:
    """A second request with the same prompt finds its full blocks."""
    driver = Driver(Limits(block_size_tokens=4))
    for request_id in (1, 2):
        driver.submit(make_request(request_id, prompt=range(10, 23)))
        driver.run()
    started = [driver.answers.of[request_id].started for request_id in (1, 2)]
    assert [event and event.num_cached_tokens for event in started] == [0, 12]
    load = driver.scheduler.load(0.0)
    assert (load.num_cached_tokens, load.num_prompt_tokens) == (12, 26)


def test_other_salts_and_prompt_logprobs_take_no_hits() -> None:
    """The first for privacy, the second because every position's logits are needed."""
    driver = Driver(Limits(block_size_tokens=4, max_step_tokens=8))
    sampling = SamplingParams(seed=1, temperature=0.0, num_prompt_logprobs=2)
    prompt = range(10, 23)
    driver.submit(make_request(1, prompt))
    driver.submit(replace(make_request(2, prompt), cache_salt=bytes(15) + b"x"))
    driver.run()
    driver.submit(make_request(3, prompt, sampling=sampling))
    driver.run()
    for request_id in (2, 3):
        started = driver.answers.of[request_id].started
        assert started is not None
        assert started.num_cached_tokens == 0
    gathered = driver.answers.of[3].prompt_logprobs
    assert gathered is not None
    assert gathered.positions == tuple(fake_logprobs(token_id, 2) for token_id in range(11, 23))
    driver.check_answers()


def test_the_prompt_logprobs_of_a_single_token_are_an_empty_list() -> None:
    """There is nothing to predict, and the caller still gets its answer."""
    sampling = SamplingParams(seed=1, num_prompt_logprobs=0)
    driver = Driver()
    driver.submit(make_request(1, prompt=[5], sampling=sampling))
    driver.run()
    gathered = driver.answers.of[1].prompt_logprobs
    assert gathered is not None
    assert gathered.positions == ()


def test_logprobs_come_with_the_tokens_of_those_who_asked() -> None:
    """A neighbour that did not ask gets none."""
    driver = Driver()
    sampling = SamplingParams(seed=1, temperature=0.0, num_logprobs=3)
    driver.submit(make_request(1, sampling=sampling))
    driver.submit(make_request(2))
    driver.run()
    asked, silent = driver.answers.of[1], driver.answers.of[2]
    assert asked.logprobs[0] == [fake_logprobs(token_id, 3) for token_id in asked.tokens[0]]
    assert silent.logprobs[0] == []


def test_the_blocks_of_a_failed_row_are_hits_for_nobody() -> None:
    """A NaN in a cached block would else fail every later request with that beginning."""
    faults = ["NaN logits"]

    def fail_once(row: RowPlan, context: Sequence[int]) -> str | None:
        return faults.pop() if faults and len(context) == 80 else None

    driver = Driver(fail_rows=fail_once)
    num_cached = []
    for request_id in (1, 2, 3):
        driver.submit(make_request(request_id, range(10, 90), max_tokens=2))
        driver.run()
        started = driver.answers.of[request_id].started
        assert started is not None
        num_cached.append(started.num_cached_tokens)
    driver.check_idle()
    driver.check_answers()
    assert driver.answers.of[1].failure == "NaN logits"
    assert num_cached == [0, 0, 76]  # what was computed since is sound
