"""How long streams pause when their replica is killed: from `kill -9` to the next token.

Two real replicas of the bundled model with steps of 20 ms under 16 streams. One replica is killed,
its streams go on at the other one, and once the supervisor has brought the first one back, again.
The gateway says how many streams it moved: they are the ones that pause longest (the others lose a
step or two; where one of them does pause longer, the result is too high). A token that the victim
had sent and that takes more than a step to arrive would make its stream's pause too short.

A pause includes the prefill that continuations need, prompts and generated tokens, which the peer
has not cached. How long that takes alone is a row of its own: as many new prompts as long.
"""

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.replicas.processes import Running, serve, wait_status
from rillgate import AsyncClient
from rillgate.status_types import ReplicaState, ReplicaStatus, ServerStatus

NUM_KILLS, NUM_STREAMS = 8, 16
STEP_MS = 20.0
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 400
"""An answer takes 8 s or more: it is cut off once everything about it is known."""
VOCAB_SIZE = 256
TOKENS_BEFORE_KILL = 60
AFTER_KILL_S = 2.0
"""In which every stream must have gone on."""
READY_S = 60.0

Row = dict[str, Any]  # Any: JSON


def pause_ms(times_s: Sequence[float], killed_s: float) -> float:
    """Return the time from the kill to the next token that the victim did not send.

    `times_s`: when tokens came. The peer's first step takes STEP_MS, so nothing of it comes sooner.
    """
    first_s = killed_s + STEP_MS / 1e3
    return (min(time_s for time_s in times_s if time_s > first_s) - killed_s) * 1e3


class Round:
    """A crowd of streams, and one kill.

    State: when each stream's tokens came, and an event that one did.
    """

    def __init__(self, client: AsyncClient, server: Running, draw: random.Random) -> None:
        self._client = client
        self._server = server
        self._draw = draw
        self._times_s: list[list[float]] = [[] for _ in range(NUM_STREAMS)]
        self._came = asyncio.Event()

    async def run(self) -> list[float]:
        """Run the streams, kill a replica; return the pauses of those that moved, in ms."""
        await wait_status(self._client, lambda it: len(ready(it)) == 2)
        streams = [asyncio.create_task(self._listen(times_s)) for times_s in self._times_s]
        try:
            victim, before = await self._pick()
            killed_s = time.perf_counter()
            self._server.replica(_name(victim)).kill()
            await asyncio.sleep(AFTER_KILL_S)
        finally:
            for stream in streams:
                stream.cancel()
            done = await asyncio.gather(*streams, return_exceptions=True)
        assert all(isinstance(it, asyncio.CancelledError) for it in done), done
        num_moved = (await self._client.status()).num_moved_streams - before
        assert num_moved, "the kill hit nothing"
        return sorted(pause_ms(times_s, killed_s) for times_s in self._times_s)[-num_moved:]

    async def _pick(self) -> tuple[ReplicaStatus, int]:
        """Wait until all streams run; return a replica, and how many streams have moved so far."""
        async with asyncio.timeout(READY_S):
            while min(map(len, self._times_s)) < TOKENS_BEFORE_KILL:
                self._came.clear()
                await self._came.wait()
        await asyncio.sleep(self._draw.uniform(0.0, STEP_MS / 1e3))  # anywhere in a step
        status = await self._client.status()
        return self._draw.choice(ready(status)), status.num_moved_streams

    async def _listen(self, times_s: list[float]) -> None:
        async for chunk in self._client.stream(
            _prompt(self._draw, PROMPT_TOKENS),
            max_tokens=OUTPUT_TOKENS,
            ignore_eos=True,
            temperature=0.0,
        ):
            assert chunk.token_offset == len(times_s), "a token is missing, or came twice"
            times_s += [time.perf_counter()] * len(chunk.token_ids)
            self._came.set()


def ready(status: ServerStatus) -> list[ReplicaStatus]:
    """Return the replicas that the gateway uses."""
    return [it for it in status.replicas if it.state is ReplicaState.READY]


def _name(replica: ReplicaStatus) -> str:
    return Path(replica.address.removeprefix("unix:")).stem


def _prompt(draw: random.Random, num_tokens: int) -> list[int]:
    return [draw.randrange(2, VOCAB_SIZE) for _ in range(num_tokens)]


async def prefill_ms(client: AsyncClient, draw: random.Random) -> list[float]:
    """Send as many new prompts, as long as continuations are; return the times to first tokens."""

    async def first_token_ms() -> float:
        prompt = _prompt(draw, PROMPT_TOKENS + TOKENS_BEFORE_KILL)
        began_s = time.perf_counter()
        await client.generate(prompt, max_tokens=1, ignore_eos=True)
        return (time.perf_counter() - began_s) * 1e3

    return await asyncio.gather(*(first_token_ms() for _ in range(NUM_STREAMS)))


async def kill_again_and_again(num_kills: int) -> tuple[list[list[float]], list[float]]:
    """Return the pauses by kill, and the times of prefills alone; all in ms."""
    draw = random.Random(0)
    flags = ("--replicas", "2", "--dtype", "float32", "--set", f"replica.min_step_ms={STEP_MS}")
    async with serve(*flags) as server, AsyncClient(server.address) as client:
        await wait_status(client, lambda it: len(ready(it)) == 2)
        await prefill_ms(client, draw)  # warm
        alone = await prefill_ms(client, draw)
        pauses: list[list[float]] = []
        for _ in range(num_kills):
            pauses.append(await Round(client, server, draw).run())
            print(
                f"  {len(pauses[-1])} streams moved: median {median(pauses[-1]):.0f} ms, ", end=""
            )
            print(f"longest {max(pauses[-1]):.0f} ms", flush=True)
        return pauses, alone


def measure(num_kills: int = NUM_KILLS) -> tuple[list[Row], dict[str, float]]:
    """Return rows and ratios for the result file."""
    by_kill, alone = asyncio.run(kill_again_and_again(num_kills))
    pauses = [pause for found in by_kill for pause in found]
    row = {
        "what": "kill -9 of one replica of two to the next token of each stream that moved",
        "unit": "milliseconds, the prefill of all that moved included",
        "median": round(median(pauses), 1),
        "p90": round(quantiles(pauses, n=10)[8], 1),
        "streams_moved": [len(found) for found in by_kill],
        "samples": [round(pause, 1) for pause in pauses],
    }
    prefill = {
        "what": f"{NUM_STREAMS} new prompts over two replicas, as long as what was continued",
        "unit": "milliseconds to the first token",
        "median": round(median(alone), 1),
        "samples": [round(it, 1) for it in alone],
    }
    print(f"{row['what']}: median {row['median']} ms, p90 {row['p90']} ms")
    print(f"{prefill['what']}: median {prefill['median']} ms")
    return [row, prefill], {"kill_to_next_token_ms": median(pauses)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="how long streams pause when a replica is killed")
    parser.add_argument("--kills", type=int, default=NUM_KILLS)
    measure(parser.parse_args().kills)


if __name__ == "__main__":
    main()
