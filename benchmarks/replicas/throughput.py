"""What a second replica brings: output tokens per second of two replicas over those of one.

    two_replicas_over_one_fake   fake replicas whose steps take 20 ms and no processor: what the
                                 gateway and its routing leave of a second replica
    two_replicas_over_one        `rillgate serve` with one thread for each replica and a model that
                                 computes: client and gateway take their share of the same cores

16 streams per replica, all sent at once; no prompt is sent twice. One and two in turn within one
run (1 2 1 2 …), and ratios round by round, so that a drift of a shared machine's speed cancels out.
"""

import argparse
import asyncio
import random
import time
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.random_checkpoint import make_checkpoint
from benchmarks.replicas.processes import gateways_over_fakes, serve, wait_status
from benchmarks.results_file import ROOT
from rillgate import AsyncClient
from rillgate.status_types import ServerStatus

STREAMS_PER_REPLICA = 16
FAKE_STEP_MS = 20.0
NUM_ROUNDS = 5
SHAPE = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 2816,
    "vocab_size": 4096,
}
"""200 MB of weights: with prompts of 512 tokens and 32 tokens out four fifths of the time are
prefill, which computes and hardly reads memory, so two replicas do not share what one alone has to
itself. (With 256 in and 64 out half of it is decoding, and the ratio the same within noise.)"""
CHECKPOINT = ROOT / "build" / "bench" / "two-replicas-shape"
CACHE = "cache.device_memory=256MiB"

Row = dict[str, Any]  # Any: JSON


@dataclass(frozen=True, slots=True)
class Work:
    """What every stream of a comparison asks for."""

    num_prompt_tokens: int
    num_output_tokens: int
    vocab_size: int


FAKE_WORK = Work(num_prompt_tokens=32, num_output_tokens=200, vocab_size=256)
REAL_WORK = Work(num_prompt_tokens=512, num_output_tokens=32, vocab_size=SHAPE["vocab_size"])


@dataclass(frozen=True, slots=True)
class Rate:
    """One crowd's."""

    tokens_per_s: float
    """From the first send to the last token."""
    split: tuple[int, ...]
    """Streams on each replica once all had a token."""


class Crowd:
    """Streams of random prompts, all at once.

    State: the draws, which no two crowds share; how many streams have no token yet.
    """

    def __init__(self, address: str, work: Work, draw: random.Random) -> None:
        self._address = address
        self._work = work
        self._draw = draw
        self._num_without = 0
        self._all_have_one = asyncio.Event()

    async def run(self, num_replicas: int) -> Rate:
        """Run a replica's worth of streams for each, to their ends."""
        num_streams = self._num_without = STREAMS_PER_REPLICA * num_replicas
        self._all_have_one.clear()
        async with AsyncClient(self._address) as client:
            await wait_status(client, _is_idle)  # connects, too, before the clock runs
            prompts = [self._prompt() for _ in range(num_streams)]
            began_s = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                split = group.create_task(self._look(client))
                for prompt in prompts:
                    group.create_task(self._listen(client, prompt))
            seconds = time.perf_counter() - began_s
        return Rate(num_streams * self._work.num_output_tokens / seconds, split.result())

    def _prompt(self) -> list[int]:
        work = self._work
        return [self._draw.randrange(2, work.vocab_size) for _ in range(work.num_prompt_tokens)]

    async def _listen(self, client: AsyncClient, prompt: list[int]) -> None:
        num_tokens = 0
        limit = self._work.num_output_tokens
        async for chunk in client.stream(
            prompt, max_tokens=limit, ignore_eos=True, temperature=0.0
        ):
            if chunk.token_ids and not num_tokens:
                self._num_without -= 1
                if not self._num_without:
                    self._all_have_one.set()
            num_tokens += len(chunk.token_ids)
        assert num_tokens == limit, f"{num_tokens} tokens of {limit}"

    async def _look(self, client: AsyncClient) -> tuple[int, ...]:
        await self._all_have_one.wait()
        return tuple(replica.num_streams for replica in (await client.status()).replicas)


def _is_idle(status: ServerStatus) -> bool:
    return not any(it.num_running or it.num_waiting for it in status.replicas)


async def compare(addresses: dict[int, str], work: Work, num_rounds: int) -> dict[int, list[Rate]]:
    """Run crowds over one and two replicas in turn; return the rates by number of replicas."""
    draw = random.Random(0)
    rates: dict[int, list[Rate]] = {1: [], 2: []}
    for number, address in addresses.items():
        await Crowd(address, work, draw).run(number)  # warm
    for _ in range(num_rounds):
        for number, address in addresses.items():
            rate = await Crowd(address, work, draw).run(number)
            rates[number].append(rate)
            print(f"  {number} x {STREAMS_PER_REPLICA} streams on {rate.split}: ", end="")
            print(f"{rate.tokens_per_s:7.1f} tokens/s", flush=True)
    return rates


async def compare_fakes(num_rounds: int = NUM_ROUNDS) -> dict[int, list[Rate]]:
    """Compare over fake replicas."""
    async with gateways_over_fakes(FAKE_STEP_MS) as (one, two):
        return await compare({1: one.address, 2: two.address}, FAKE_WORK, num_rounds)


async def compare_real(
    num_rounds: int = NUM_ROUNDS, checkpoint: Path = CHECKPOINT
) -> dict[int, list[Rate]]:
    """Compare two real servers; the one that is not asked waits."""
    make_checkpoint(checkpoint, SHAPE, torch.bfloat16)
    addresses: dict[int, str] = {}
    async with AsyncExitStack() as stack:
        for number in (1, 2):
            flags = ("--model", str(checkpoint), "--replicas", str(number))
            settings = ("--set", "replica.num_threads=1", "--set", CACHE)
            server = await stack.enter_async_context(serve(*flags, *settings))
            addresses[number] = server.address
        return await compare(addresses, REAL_WORK, num_rounds)


def rows_of(what: str, rates: dict[int, list[Rate]]) -> list[Row]:
    """Return one row per number of replicas."""
    return [
        {
            "what": f"{what}, {number} x {STREAMS_PER_REPLICA} streams",
            "unit": "output tokens/s",
            "median": round(median(_speeds(found)), 1),
            "samples": [round(speed, 1) for speed in _speeds(found)],
            "streams_per_replica": [list(rate.split) for rate in found],
        }
        for number, found in rates.items()
    ]


def ratio_of(rates: dict[int, list[Rate]]) -> float:
    """Return the median over the rounds of two's rate over one's."""
    return median(two / one for one, two in zip(_speeds(rates[1]), _speeds(rates[2]), strict=True))


def _speeds(rates: Iterable[Rate]) -> list[float]:
    return [rate.tokens_per_s for rate in rates]


def measure(num_rounds: int = NUM_ROUNDS) -> tuple[list[Row], dict[str, float]]:
    """Return rows and ratios for the result file."""
    print(f"fake replicas, steps of {FAKE_STEP_MS:g} ms", flush=True)
    fake = asyncio.run(compare_fakes(num_rounds))
    print("rillgate serve, one thread per replica", flush=True)
    real = asyncio.run(compare_real(num_rounds))
    rows = rows_of(f"fake replicas, steps of {FAKE_STEP_MS:g} ms", fake)
    rows += rows_of("rillgate serve, one thread per replica", real)
    ratios = {
        "two_replicas_over_one_fake": ratio_of(fake),
        "two_replicas_over_one": ratio_of(real),
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f}")
    return rows, ratios


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="what a second replica brings")
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    measure(parser.parse_args().rounds)


if __name__ == "__main__":
    main()
