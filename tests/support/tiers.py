"""Prompts, copies and drivers with which a test leads blocks from one tier to the other."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rillgate_server.core.load import EngineLoad
from rillgate_server.core.request import Request
from rillgate_server.core.step import CopyDirection, CopyJob, RequestStarted
from rillgate_server.engine.testing import FakeCopies
from tests.support.engine import Driver, Limits, make_request

SIZE = 4
PROMPT_TOKENS = 13
"""Three full blocks, and the one token that is never a hit."""
NUM_HIT_TOKENS = 12
LIMITS = Limits(
    num_blocks=16, block_size_tokens=SIZE, max_running=4, num_host_blocks=64, load_policy="load"
)
OUT, IN = CopyDirection.DEVICE_TO_HOST, CopyDirection.HOST_TO_DEVICE
INSTANT = FakeCopies()


def prompt(number: int) -> list[int]:
    """Make the prompt of this number: it shares nothing with any other one."""
    return [10 + number + i * (number + 1) % 40 for i in range(PROMPT_TOKENS)]


def ask(driver: Driver, request: Request) -> RequestStarted:
    """Let one request run to its end alone; return what it found."""
    assert driver.submit(request) is None
    driver.run()
    driver.check_idle()
    driver.check_answers()
    started = driver.answers.of[request.request_id].started
    assert started is not None
    return started


def question(request_id: int, number: int, max_tokens: int = 1) -> Request:
    """Ask with the prompt of a number."""
    return make_request(request_id, prompt(number), max_tokens)


def found(driver: Driver, request: Request) -> tuple[int, int]:
    """Return the tokens that a request finds: (in the device tier, in the host tier)."""
    started = ask(driver, request)
    num_host_tokens = started.num_cached_host_tokens
    return started.num_cached_tokens - num_host_tokens, num_host_tokens


def fill(driver: Driver, numbers: Sequence[int] = range(1, 9)) -> None:
    """Ask so much else that what was there before is only in the host tier."""
    for number in numbers:
        ask(driver, question(1000 + number, number))


def slow(direction: CopyDirection, num_steps: int = 6) -> FakeCopies:
    """Let copies of one direction take their time."""
    return FakeCopies(copy_steps=lambda job: num_steps if job.direction is direction else 0)


def failing(direction: CopyDirection, position: int | None = None) -> FakeCopies:
    """Let all pairs of copies of one direction fail, or the one at `position`."""

    def fail(job: CopyJob) -> tuple[int, ...]:
        if job.direction is not direction:
            return ()
        return tuple(range(len(job.pairs))) if position is None else (position,)

    return FakeCopies(fail_copies=fail)


def in_host_tier(copies: FakeCopies = INSTANT, **limits: Any) -> Driver:  # as Limits has them
    """Make a driver whose host tier alone has prompt 0."""
    driver = Driver(replace(LIMITS, **limits), copies=copies)
    ask(driver, question(1, 0))
    fill(driver)
    return driver


def with_copy_in_flight(direction: CopyDirection) -> Driver:
    """Make a driver with a long copy of one direction in flight, and requests 100 to 104."""
    copies = slow(direction, num_steps=30)
    driver = in_host_tier(copies) if direction is IN else Driver(LIMITS, copies=copies)
    for number in range(5):
        driver.submit(question(100 + number, number, max_tokens=3))
    step_until(driver, lambda: any(job.direction is direction for job in driver.in_flight.values()))
    return driver


def load_of(driver: Driver) -> EngineLoad:
    """Return the load now."""
    return driver.scheduler.load(driver.clock.now())


def jobs(driver: Driver, direction: CopyDirection) -> list[CopyJob]:
    """Return all copies of a direction so far."""
    return [job for plan in driver.plans for job in plan.copies if job.direction is direction]


def step_until(driver: Driver, is_now: Callable[[], bool]) -> None:
    """Step until something holds, for at most 50 steps."""
    for _ in range(50):
        if is_now():
            return
        driver.step()
    raise AssertionError("it never came to that")
