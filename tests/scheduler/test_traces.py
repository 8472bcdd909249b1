"""Random traces through the whole control plane, against answers made one request at a time.

Half of them have two plans in flight, over a device that is now ahead of the host, now behind.
After every step the driver proves the integrity of pools, index, queue and batch, and at the end
that every block is free or cached. `RILLGATE_TRACES=10000 pytest --timeout 3600 …` plays more
traces than a commit waits for.
"""

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import event, given, note, settings
from hypothesis import strategies as st

from rillgate_server.core.request import ChoiceStart, RejectReason, Request
from rillgate_server.core.step import CopyDirection
from tests.support.drafts import random_draft_model
from tests.support.engine import Driver, Limits
from tests.support.pipelined import PipelinedDriver
from tests.support.traces import (
    MAX_EVENTS,
    Abort,
    Corrupt,
    Event,
    Flush,
    Moment,
    NextTurn,
    Steps,
    Submit,
    fail_poisoned,
    random_copies,
    random_limits,
    random_trace,
)

NUM_TRACES = int(os.environ.get("RILLGATE_TRACES", "2000"))
NUM_PARTS = 8
"""Tests that share the traces: each well inside a test's time limit on a slow machine."""
MAX_WAIT_STEPS = 12
"""For the moment of an abort; then it comes anyway."""


class Player:
    """Plays a trace. State: the driver, and the accepted requests, oldest first."""

    def __init__(self, driver: Driver) -> None:
        """Start with nothing accepted."""
        self.driver = driver
        self.ids: list[int] = []

    def play(self, trace: Sequence[Event]) -> None:
        """Play a trace, then run until nothing is left."""
        for entry in trace:
            self._play(entry)
        self.driver.run()

    def _play(self, entry: Event) -> None:
        driver = self.driver
        match entry:
            case Submit(request):
                self._submit(request)
            case NextTurn() if entry.age < len(self.ids):
                self._submit(self._next_turn(entry))
            case Abort(age, choice, moment) if age < len(self.ids):
                self._wait_for(moment)
                self._abort(self._victim(age, moment), choice, moment)
            case Steps(count, loses_first, refuses_first):
                driver.loses_next_step = loses_first
                if isinstance(driver, PipelinedDriver):
                    driver.loses_next_begin = refuses_first
                for _ in range(count):
                    driver.step()
            case Flush(moment):
                self._wait_for(moment)
                driver.flush()
            case Corrupt(every) if driver.limits.audit:
                for block in range(0, driver.limits.num_host_blocks, every):
                    driver.fake.corrupt(block)
            case _:
                pass

    def _submit(self, request: Request) -> None:
        rejection = self.driver.submit(request)
        if rejection is None:
            self.ids.append(request.request_id)
        else:
            assert rejection.reason in (RejectReason.TOO_LONG, RejectReason.OVERLOADED)

    def _next_turn(self, turn: NextTurn) -> Request:
        answer = self.driver.answers.of[self.ids[-1 - turn.age]]
        first = answer.request.choices[0]
        return replace(
            answer.request,
            request_id=turn.request_id,
            prompt_token_ids=(
                *answer.request.prompt_token_ids,
                *(answer.tokens[first.index] if turn.keeps_answer else ()),
                *turn.tail,
            ),
            choices=(ChoiceStart(0),),
            max_tokens=turn.max_tokens,
            sampling=replace(answer.request.sampling, min_tokens=0, num_prompt_logprobs=None),
        )

    def _wait_for(self, moment: Moment) -> None:
        for _ in range(MAX_WAIT_STEPS):
            if not self.driver.scheduler.has_work or self._is_now(moment):
                return
            self.driver.step()

    def _victim(self, age: int, moment: Moment) -> int:
        answers = self.driver.answers
        if moment is Moment.COPY_IN:
            for request_id in self.ids:
                if request_id not in answers.gone and answers.of[request_id].started is None:
                    return request_id
        return self.ids[-1 - age]

    def _abort(self, request_id: int, choice: int | None, moment: Moment) -> None:
        driver = self.driver
        plan = driver.begin() if moment is Moment.DURING_STEP else None
        driver.abort(request_id, () if choice is None else (choice,))
        if plan is not None:
            driver.end(plan)

    def _is_now(self, moment: Moment) -> bool:
        match moment:
            case Moment.COPY_IN:
                return self.driver.scheduler.load(0.0).num_loading > 0
            case Moment.COPY_OUT:
                jobs = self.driver.in_flight.values()
                return any(job.direction is CopyDirection.DEVICE_TO_HOST for job in jobs)
            case Moment.PREEMPTED:
                return self.driver.scheduler.load(0.0).num_preemptions > 0
            case _:
                return True


def make_driver(rng: random.Random, limits: Limits) -> Driver:
    """Build what plays a trace."""
    copies = random_copies(rng)
    if limits.max_plans_in_flight == 1:
        return Driver(limits, fail_rows=fail_poisoned, copies=copies)
    speed = rng.choice((0.0, 0.5, 1.0))
    return PipelinedDriver(
        limits,
        fail_rows=fail_poisoned,
        copies=copies,
        is_device_fast=lambda: rng.random() < speed,
    )


def tell_what_happened(driver: Driver) -> None:
    """Let `pytest --hypothesis-show-statistics` say how much of the traces meets what."""
    load = driver.scheduler.load(driver.clock.now())
    met = {
        "preempted": load.num_preemptions,
        "swapped": load.decisions.num_swap_preemptions,
        "stored": load.copies.num_stored_blocks,
        "loaded": load.copies.num_loaded_blocks,
        "lost copies": load.copies.num_failed_blocks,
        "refused": load.copies.num_refused_blocks,
        "evicted from the host tier": load.host.num_evicted_blocks,
        "drafted": load.num_drafted_tokens,
        "accepted drafts": load.num_accepted_tokens,
    }
    plans = f" ({driver.limits.max_plans_in_flight} plans)"
    for name, count in met.items():
        if count:
            event(name + plans)


@pytest.mark.parametrize("part", range(NUM_PARTS))
@settings(max_examples=NUM_TRACES // NUM_PARTS, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    kept=st.lists(st.integers(0, 99), min_size=MAX_EVENTS, max_size=MAX_EVENTS),
)
def test_any_trace_gives_every_request_its_own_answer_and_leaves_no_block_behind(
    part: int, seed: int, kept: list[int]
) -> None:
    """Sharing, chunks, drafts, swapping, slow and failed copies, aborts: none changes an answer.

    A seed makes the trace, for hypothesis' own draws are too simple, too often, to fill two tiers.
    It takes events out until as few as possible are left that still fail: those at which `kept` is
    not 0 are played.
    """
    rng = random.Random(seed * NUM_PARTS + part)
    limits = random_limits(rng)
    # Who has drafts waits for results; without any, most plans overlap.
    trace = random_trace(rng, may_draft=limits.speculation.method != "off")
    driver = make_driver(rng, limits)
    driver.fake.propose = random_draft_model(rng, driver.fake)
    trace = [entry for entry, is_kept in zip(trace, kept, strict=False) if is_kept]
    note(f"{limits}, {trace}")
    Player(driver).play(trace)
    driver.check_idle()
    driver.check_answers()
    driver.flush()
    load = driver.scheduler.load(driver.clock.now())
    assert load.device.num_blocks_free == load.device.num_blocks
    assert load.host.num_blocks_free == load.host.num_blocks
    tell_what_happened(driver)


def test_none_of_this_imports_torch() -> None:
    """The control plane and its fake data plane run where there is no torch at all."""
    script = (
        "import sys, tests.scheduler.test_traces, rillgate_server.engine.engine_loop\n"
        "assert 'rillgate_server.scheduler.scheduler' in sys.modules\n"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, timeout=60, check=False)
    assert done.returncode == 0
