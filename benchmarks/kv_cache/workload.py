"""Conversations in a closed loop: who asks what and when, the same for every contestant.

Owns the users: their token ids, think times and what they saw. Does not know engines or clocks:
time comes in, requests go out, so that a real engine and a simulated one serve the same users.

    prompt of turn 1   | system | question 1 |                        answer: | thought | reply |
    prompt of turn 2   | system | question 1 | reply 1 | question 2 |

The history drops what the model thought, as the chat template of DeepSeek-R1 does: a turn's prompt
continues the one before, but not what was cached of its answer.
"""

import heapq
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from rillgate_server.core.request import ChoiceStart, Request
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import StepOutput

FIRST_TOKEN_ID = 2
"""Token ids below are the model's specials."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Everything that decides what the users do."""

    num_users: int
    num_turns: int
    num_system_tokens: int
    """The same for all users."""
    num_first_tokens: int
    """Of the first question: a document comes with it."""
    num_question_tokens: int
    """Of each later one."""
    num_thought_tokens: int
    """Of an answer; the history drops them."""
    num_reply_tokens: int
    """Of an answer; the history keeps them."""
    think_s: float
    """Mean wait before each question; evenly distributed from half to one and a half of it."""
    vocab_size: int = 4096
    seed: int = 0

    @property
    def num_answer_tokens(self) -> int:
        """Tokens generated in a turn."""
        return self.num_thought_tokens + self.num_reply_tokens

    @property
    def longest_tokens(self) -> int:
        """Tokens of the last turn, its answer included."""
        num_later = (self.num_turns - 1) * (self.num_question_tokens + self.num_reply_tokens)
        return self.num_system_tokens + self.num_first_tokens + num_later + self.num_answer_tokens

    @property
    def working_set_tokens(self) -> int:
        """Tokens that a cache must hold for every prompt to be found as far as possible."""
        num_private = self.longest_tokens - self.num_system_tokens
        return self.num_system_tokens + self.num_users * num_private


@dataclass(frozen=True, slots=True)
class TurnSample:
    """One turn as its user saw it."""

    turn: int
    """From 1."""
    ttft_s: float
    """From the moment the question was due to the first token."""
    num_prompt_tokens: int
    num_cached_tokens: int


@dataclass(slots=True)
class _User:
    """One conversation."""

    draw: random.Random
    history: list[int]
    turn: int = 0


@dataclass(slots=True)
class _Open:
    """A turn that is being answered."""

    user: int
    due_s: float
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    answer: list[int] = field(default_factory=list)


class Users:
    """All users of one run.

    State: their conversations, when each asks next, the open turns, and the samples.
    """

    def __init__(self, workload: Workload, start_s: float) -> None:
        """Let everybody think first, from `start_s` on."""
        self.samples: list[TurnSample] = []
        self.num_output_tokens = 0
        self._workload = workload
        system = self._tokens(random.Random(workload.seed), workload.num_system_tokens)
        self._users = [
            _User(random.Random(workload.seed * 10_007 + user + 1), list(system))
            for user in range(workload.num_users)
        ]
        self._due: list[tuple[float, int]] = []  # heap of (when, user)
        self._open: dict[int, _Open] = {}  # request id -> turn
        self._num_requests = 0
        for number in range(workload.num_users):
            self._think(number, start_s)

    def __repr__(self) -> str:
        return f"Users(samples={len(self.samples)}, open={len(self._open)}, due={len(self._due)})"

    @property
    def is_done(self) -> bool:
        """Whether all turns of all users were answered."""
        return not (self._due or self._open)

    @property
    def next_due_s(self) -> float | None:
        """When the next question is due; None: not before somebody is answered."""
        return self._due[0][0] if self._due else None

    def ask(self, now: float) -> list[Request]:
        """Return the questions that are due."""
        requests = []
        while self._due and self._due[0][0] <= now:
            due_s, number = heapq.heappop(self._due)
            requests.append(self._ask(number, due_s))
        return requests

    def hear(self, output: StepOutput, now: float) -> None:
        """Take in what an engine answered at `now`."""
        assert not output.failed, output.failed
        for started in output.started:
            self._open[started.request_id].num_cached_tokens = started.num_cached_tokens
        for tokens in output.tokens:
            self._hear_tokens(self._open[tokens.request_id], tokens.token_ids, now)
        for finished in output.finished:
            turn = self._open.pop(finished.request_id)
            user = self._users[turn.user]
            user.history += turn.answer[self._workload.num_thought_tokens :]
            if user.turn < self._workload.num_turns:
                self._think(turn.user, now)

    def _hear_tokens(self, turn: _Open, token_ids: Iterable[int], now: float) -> None:
        if not turn.answer:
            number = self._users[turn.user].turn
            ttft_s = now - turn.due_s
            self.samples.append(
                TurnSample(number, ttft_s, turn.num_prompt_tokens, turn.num_cached_tokens)
            )
        num_before = len(turn.answer)
        turn.answer += token_ids
        self.num_output_tokens += len(turn.answer) - num_before

    def _think(self, number: int, now: float) -> None:
        wait_s = self._workload.think_s * self._users[number].draw.uniform(0.5, 1.5)
        heapq.heappush(self._due, (now + wait_s, number))

    def _ask(self, number: int, due_s: float) -> Request:
        user, workload = self._users[number], self._workload
        user.turn += 1
        is_first = user.turn == 1
        num_tokens = workload.num_first_tokens if is_first else workload.num_question_tokens
        user.history += self._tokens(user.draw, num_tokens)
        self._num_requests += 1
        self._open[self._num_requests] = _Open(number, due_s, len(user.history))
        return Request(
            request_id=self._num_requests,
            prompt_token_ids=tuple(user.history),
            choices=(ChoiceStart(0),),
            # Greedy answers of a random model repeat one token: a reply would look like a thought.
            sampling=SamplingParams(seed=self._num_requests, temperature=1.0),
            max_tokens=workload.num_answer_tokens,
            arrival_s=due_s,
        )

    def _tokens(self, draw: random.Random, count: int) -> list[int]:
        return [draw.randrange(FIRST_TOKEN_ID, self._workload.vocab_size) for _ in range(count)]
