"""A process that calls a server as many users do: streams at once, or a closed loop of users.

Several of them share a load, each a part of its numbers. All times are on the machine's monotonic
clock, which its processes share.

    {"mode": "streams", "target", "seed", "numbers", "prompt_tokens", "vocab_size", "output_tokens",
     "begin_s"}                          -> {"streams": [[sent, first, nth, last token], …]}
    {"mode": "users", … and "users", "think_s", "ramp_s", "end_s"}
                                         -> the same, a stream per request

`output_tokens`: one number a stream; `nth_token`: whose arrival is the third time.
"""

import asyncio
import random
import time
from collections.abc import Sequence

from benchmarks.contestants.protocol import Message, serve
from benchmarks.gpu.prompts import prompt
from rillgate import AsyncClient

Times = list[float]
"""When it was sent; when its first, its nth and its last token came."""
_PROMPTS_PER_USER = 10_000
"""Numbers of prompts that belong to one user."""


def answer(request: Message) -> Message:
    """Do what a message asks."""
    run = {"streams": _streams, "users": _users}[request["mode"]]
    return {"streams": asyncio.run(run(request))}


async def _streams(request: Message) -> list[Times]:
    """Send all at once, at the agreed moment."""
    given = [_prompt(request, number) for number in request["numbers"]]
    async with AsyncClient(request["target"]) as client:
        await client.models()  # connects before the clock runs
        await _wait_until(request["begin_s"])
        return await asyncio.gather(
            *(
                _stream(client, request, prompt, num_tokens)
                for prompt, num_tokens in zip(given, request["output_tokens"], strict=True)
            )
        )


async def _users(request: Message) -> list[Times]:
    """Let each user ask, read, think and ask again; they begin one after another."""
    async with AsyncClient(request["target"]) as client:
        await client.models()
        found = await asyncio.gather(*(_user(client, request, user) for user in request["users"]))
    return [times for requests in found for times in requests]


async def _user(client: AsyncClient, request: Message, user: int) -> list[Times]:
    draw = random.Random(f"{request['seed']}/{user}")
    await _wait_until(request["begin_s"] + draw.uniform(0.0, request["ramp_s"]))
    found: list[Times] = []
    while time.monotonic() < request["end_s"]:
        given = _prompt(request, user * _PROMPTS_PER_USER + len(found))
        found.append(await _stream(client, request, given, request["output_tokens"]))
        await asyncio.sleep(draw.expovariate(1.0 / request["think_s"]))
    return found


async def _stream(
    client: AsyncClient, request: Message, given: Sequence[int], num_tokens: int
) -> Times:
    """Read one stream to its end. Raises RuntimeError where tokens are missing."""
    sent_s = time.monotonic()
    arrivals: list[float] = []
    stream = client.stream(list(given), max_tokens=num_tokens, ignore_eos=True, temperature=0.0)
    async for chunk in stream:
        arrivals += [time.monotonic()] * len(chunk.token_ids)
    if len(arrivals) != num_tokens:
        raise RuntimeError(f"a stream of {len(arrivals)} tokens; asked were {num_tokens}")
    nth = min(request["nth_token"], num_tokens)
    return [sent_s, arrivals[0], arrivals[nth - 1], arrivals[-1]]


def _prompt(request: Message, number: int) -> list[int]:
    return prompt(request["seed"], number, request["prompt_tokens"], request["vocab_size"])


async def _wait_until(moment_s: float) -> None:
    await asyncio.sleep(max(0.0, moment_s - time.monotonic()))


if __name__ == "__main__":
    serve(answer)
