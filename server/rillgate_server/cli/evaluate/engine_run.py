"""Requests in, what the engine made of them out: a scheduler and a model in this process.

Owns the loop. Does not know text, tasks or scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from rillgate_server.config.settings import Settings
from rillgate_server.core.clock import SystemClock
from rillgate_server.core.request import RejectReason, Request
from rillgate_server.core.step import StepOutput, TokenLogprobs
from rillgate_server.engine.engine import Engine
from rillgate_server.errors import ConfigError
from rillgate_server.replica.process import ReadyModel
from rillgate_server.scheduler.scheduler import Scheduler


@dataclass(slots=True)
class Answer:
    """What a request with one choice got."""

    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    failure: str = ""
    """Why the engine gave it up; empty: it did not."""


class EngineRun:
    """Runs batches of requests, one batch after another. State: the engine's."""

    def __init__(self, ready: ReadyModel, settings: Settings) -> None:
        """Start idle over the model's empty cache."""
        # Nothing arrives later: there is nobody to wait for.
        batcher = replace(settings.batcher, max_queue_delay_ms=0.0)
        self._scheduler = Scheduler(batcher, settings.cache, ready.spec, ready.sizes)
        self._clock = SystemClock()
        self._engine = Engine(self._scheduler, ready.executor, self._clock)
        self._most_in_flight = 2 * batcher.max_running

    def run(self, requests: Sequence[Request], on_done: Callable[[int], None]) -> dict[int, Answer]:
        """Return the answer of each request by its id; `on_done` gets how many are done.

        As many run together as may; raises ConfigError for one that the engine refuses.
        """
        answers = {request.request_id: Answer() for request in requests}
        waiting = list(reversed(requests))
        num_done = 0
        while num_done < len(requests):
            num_open = len(requests) - len(waiting) - num_done
            while waiting and num_open < self._most_in_flight and self._add(waiting[-1], num_open):
                waiting.pop()
                num_open += 1
            output = self._engine.step()
            if output is not None:
                num_done += _apply(output, answers)
                on_done(num_done)
        return answers

    def _add(self, request: Request, num_open: int) -> bool:
        """Queue a request; False when it must wait for room in the queue."""
        rejection = self._scheduler.add(request, self._clock.now())
        if rejection is None:
            return True
        if rejection.reason is RejectReason.OVERLOADED and num_open:
            return False
        raise ConfigError(f"prompt {request.request_id + 1} was refused: {rejection.message}")


def _apply(output: StepOutput, answers: dict[int, Answer]) -> int:
    """Note what a step brought; return how many requests it ended."""
    for tokens in output.tokens:
        answers[tokens.request_id].token_ids += tokens.token_ids
    for logprobs in output.prompt_logprobs:
        answers[logprobs.request_id].prompt_logprobs = logprobs.positions
    for failed in output.failed:
        answers[failed.request_id].failure = failed.message
    return len(output.finished) + len(output.failed)
