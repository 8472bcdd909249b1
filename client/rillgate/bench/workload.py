"""What a benchmark sends: prompts and when.

Owns the requests and their arrival times, both decided before the first is sent. Knows nothing of
servers.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rillgate.types import ChatMessage, Prompt


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request of a benchmark."""

    prompt: Prompt
    max_tokens: int
    ignore_eos: bool
    """True: exactly `max_tokens` come back, so that runs are comparable."""


@dataclass(frozen=True, slots=True)
class RandomPrompts:
    """A source of prompts of random token ids."""

    vocab_size: int
    num_prompt_tokens: int
    num_output_tokens: int
    nonce: str
    """Another nonce, other prompts: a fresh one keeps a server's prefix cache out of the numbers
    (16 tokens, one cache block, practically never repeat)."""
    excluded_token_ids: frozenset[int] = frozenset()
    """Not in the prompts: the end of sequence."""

    def requests(self, num: int, series: str) -> list[BenchRequest]:
        """Draw `num` requests; every series has its own."""
        rng = random.Random(f"{self.nonce}/{series}")
        allowed = [i for i in range(self.vocab_size) if i not in self.excluded_token_ids]
        return [
            BenchRequest(
                tuple(rng.choices(allowed, k=self.num_prompt_tokens)), self.num_output_tokens, True
            )
            for _ in range(num)
        ]


def load_dataset(path: Path, max_tokens: int, ignore_eos: bool) -> list[BenchRequest]:
    """Read requests from JSON Lines; raise ValueError naming the line that is wrong.

    Each line is an object with one of `prompt` (text), `messages` (a list of {role, content}) or
    `token_ids`, and maybe `max_tokens`.
    """
    requests = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            requests.append(_to_request(json.loads(line), max_tokens, ignore_eos))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}: {error}; allowed: a JSON object with one of prompt, "
                "messages, token_ids, and maybe max_tokens"
            ) from error
    if not requests:
        raise ValueError(f"{path} holds no request")
    return requests


def _to_request(entry: dict[str, object], max_tokens: int, ignore_eos: bool) -> BenchRequest:
    if not isinstance(entry, dict):
        raise TypeError(f"{type(entry).__name__} is no object")
    limit = entry.get("max_tokens", max_tokens)
    if not isinstance(limit, int):
        raise TypeError(f"max_tokens is {limit!r}")
    return BenchRequest(_to_prompt(entry), limit, ignore_eos)


def _to_prompt(entry: dict[str, object]) -> Prompt:
    match entry:
        case {"prompt": str(prompt)}:
            return prompt
        case {"messages": list(messages)}:
            return [_to_message(message) for message in messages]
        case {"token_ids": list(token_ids)}:
            return [int(token_id) for token_id in token_ids]
        case _:
            raise ValueError("no prompt")


def _to_message(entry: object) -> ChatMessage:
    match entry:
        case {"role": str(role), "content": str(content)}:
            return ChatMessage(role, content)
        case _:
            raise ValueError("a message without role and content")


def poisson_arrivals(rate_per_s: float, num: int, seed: int) -> Sequence[float]:
    """Draw when requests come, in seconds from the start: independent, `rate_per_s` on average."""
    rng = random.Random(f"arrivals/{seed}")
    arrival_s = 0.0
    arrivals = []
    for _ in range(num):
        arrivals.append(arrival_s)
        arrival_s += rng.expovariate(rate_per_s)
    return arrivals
