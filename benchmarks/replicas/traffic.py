"""Uneven requests: conversations of heavy-tailed lengths that come in bursts and share prefixes.

Owns who asks what and when. Does not know nodes or routing: time goes in, requests come out, the
same for every policy up to what a follow-up question waits for (the answer before it).
"""

import random
from dataclasses import dataclass, field

from rillgate_server.core.welcome import Welcome
from rillgate_server.routing.router import RouteRequest, request_hashes

VOCAB_SIZE = 32_000
MEAN_QUESTION_TOKENS, MEAN_ANSWER_TOKENS = 150, 150
SIGMA = 1.1
"""Of the lengths' logarithms: the longest percent is 6 times the mean or more."""
MAX_TOKENS = 3000
"""Of one question or answer."""
MEAN_THINK_S = 4.0
BURST_FACTOR, BURST_S, BURST_EVERY_S = 4.0, 1.5, 10.0
"""For BURST_S in every BURST_EVERY_S conversations begin so many times as often as else."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What differs between kinds of traffic."""

    conversations_per_s: float
    num_system_prompts: int = 12
    """The first one is asked most often, the n-th 1/n as often."""
    system_tokens: tuple[int, int] = (64, 1024)
    """Least and most of a system prompt's."""
    follow_up_probability: float = 0.6
    """After each answer."""


@dataclass(slots=True, eq=False)
class SimRequest:
    """One question with all before it; compared by identity."""

    conversation: int
    due_s: float
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """The tokens that will be generated."""
    prompt_hashes: list[bytes] = field(default_factory=list)
    """Of the blocks that may be hits."""
    all_hashes: list[bytes] = field(default_factory=list)
    """Of all full blocks, answer included."""
    first_token_s: float = 0.0
    num_hit_tokens: int = 0

    @property
    def num_output_tokens(self) -> int:
        """Tokens to generate."""
        return len(self.answer)

    @property
    def num_all_tokens(self) -> int:
        """Tokens that it holds blocks for at its end."""
        return len(self.prompt) + len(self.answer)


class Traffic:
    """The users.

    State: the draws (one generator per conversation, so that an order of answers changes nothing
    else), and the number of conversations.
    """

    def __init__(self, seed: int, shape: Shape, welcome: Welcome) -> None:
        """Draw the system prompts. `welcome`: of the nodes, for hashes."""
        self._seed = seed
        self._shape = shape
        self._welcome = welcome
        self._arrivals = random.Random(f"{seed} arrivals")
        draw = random.Random(f"{seed} systems")
        self._systems = [
            tuple(draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(*shape.system_tokens)))
            for _ in range(shape.num_system_prompts)
        ]
        self._draws: list[random.Random] = []  # conversation -> its generator

    def next_start_s(self, now: float) -> float:
        """Draw when the next conversation begins."""
        quiet = self._shape.conversations_per_s / (1 + (BURST_FACTOR - 1) * BURST_S / BURST_EVERY_S)
        while True:  # thinning
            now += self._arrivals.expovariate(quiet * BURST_FACTOR)
            is_burst = now % BURST_EVERY_S < BURST_S
            if is_burst or self._arrivals.random() < 1 / BURST_FACTOR:
                return now

    def begin(self, now: float) -> SimRequest:
        """Begin a conversation: one of the system prompts, the first ones often, and a question."""
        conversation = len(self._draws)
        draw = random.Random(f"{self._seed} {conversation}")
        self._draws.append(draw)
        weights = [1 / (rank + 1) for rank in range(len(self._systems))]
        (system,) = draw.choices(self._systems, weights)
        return self._ask(conversation, now, system)

    def follow_up(self, request: SimRequest, now: float) -> SimRequest | None:
        """Return the next question of the conversation, due later; None: it is over."""
        draw = self._draws[request.conversation]
        history = request.prompt + request.answer
        if draw.random() > self._shape.follow_up_probability or len(history) > 2 * MAX_TOKENS:
            return None
        due_s = now + draw.expovariate(1 / MEAN_THINK_S)
        return self._ask(request.conversation, due_s, history)

    def _ask(self, conversation: int, due_s: float, history: tuple[int, ...]) -> SimRequest:
        draw = self._draws[conversation]
        prompt = history + _tokens(draw, MEAN_QUESTION_TOKENS)
        request = SimRequest(conversation, due_s, prompt, _tokens(draw, MEAN_ANSWER_TOKENS))
        size = self._welcome.block_size_tokens
        whole = RouteRequest(prompt + request.answer + (0,))  # one more: its last block counts too
        request.all_hashes = list(request_hashes(whole, self._welcome))
        request.prompt_hashes = request.all_hashes[: (len(prompt) - 1) // size]
        return request


def _tokens(draw: random.Random, mean: int) -> tuple[int, ...]:
    """Draw tokens; their number is lognormal."""
    scale = draw.lognormvariate(-SIGMA * SIGMA / 2, SIGMA)
    num_tokens = max(1, min(MAX_TOKENS, round(mean * scale)))
    return tuple(draw.randrange(VOCAB_SIZE) for _ in range(num_tokens))
