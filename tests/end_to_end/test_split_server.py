"""`rillgate serve --tensor-parallel 2`: the bundled model's own answers, whichever rank is lost.

Real processes. What a whole server answers in float32 is what a split one must answer, also to
streams that were under way when a rank died or hung.
"""

import asyncio
import os
import re
import signal

import psutil
import pytest

from rillgate import AsyncClient
from rillgate.types import GenerateOptions
from tests.support.crowd import Asked, Heard, differences, listen
from tests.support.served import READY, START_S, Server, serve

RANK = "RILLGATE_REPLICA__RANK"
MAX_TOKENS = 60
MIN_HIT = 4
"""Streams that had a token and were not over when a rank was lost."""
LOSSES = ((1, signal.SIGKILL), (0, signal.SIGSTOP))
"""In the second one it is rank 1 that notices, and its end by which the supervisor does."""


def questions() -> list[Heard]:
    """Make eight streams: greedy and seeded ones, with penalties, log-probabilities, choices."""
    greedy: GenerateOptions = {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    seeded: GenerateOptions = {"temperature": 0.8, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    ways: list[GenerateOptions] = [
        greedy,
        {**greedy, "logprobs": 2},
        {**seeded, "seed": 3, "n": 2},
        {**seeded, "seed": 4, "presence_penalty": 0.3, "repetition_penalty": 1.05},
    ]
    return [
        Heard(Asked(f"What is {12 + number} plus 30?", ways[number % len(ways)]))
        for number in range(8)
    ]


def ranks(server: Server) -> dict[int, psutil.Process]:
    """Map rank -> process."""
    found = psutil.Process(server.process.pid).children()
    return {int(it.environ()[RANK]): it for it in found if "replica" in it.cmdline()}


async def asked_while_a_rank_is_lost(
    client: AsyncClient, server: Server, rank: int, number: signal.Signals
) -> list[Heard]:
    """Ask all questions, send `number` to a rank once enough streams run, and hear them out."""
    heard = questions()
    enough = asyncio.Event()

    def count() -> None:
        if sum(it.has_token for it in heard) >= MIN_HIT:
            enough.set()

    streams = [asyncio.create_task(listen(client, it, count)) for it in heard]
    async with asyncio.timeout(START_S):
        await enough.wait()
        old = ranks(server)
        assert sum(it.has_token and not _is_over(it) for it in heard) >= MIN_HIT
        old[rank].send_signal(number)
        await asyncio.gather(*streams)
    assert sorted(old) == [0, 1]
    assert not [it for it in old.values() if it.is_running()], "a rank outlived its group"
    return heard


def _is_over(heard: Heard) -> bool:
    return all(choice.finish_reason is not None for choice in heard.choices.values())


@pytest.mark.timeout(300)  # four starts of processes that import torch
async def test_a_split_server_answers_as_a_whole_one_whichever_rank_is_lost() -> None:
    """Killed or stopped, in the middle of decoding; then SIGTERM, which leaves nobody."""
    async with serve("--dtype", "float32") as server:
        address = (await server.wait_line(READY)).group(1)
        async with AsyncClient(address) as client:
            expected = await asyncio.gather(*(listen(client, it) for it in questions()))
    assert not [it.faults for it in expected if it.faults]

    flags = ("--dtype", "float32", "--tensor-parallel", "2", "--set", "replica.min_step_ms=20")
    async with serve(*flags) as server:
        address = (await server.wait_line(READY)).group(1)
        await server.wait_line(re.compile("replica-0: cpu with . thread.*, cpu with . thread"))
        async with AsyncClient(address) as client:
            (replica,) = (await client.status()).replicas
            assert replica.tensor_parallel_size == 2
            for rank, number in LOSSES:
                heard = await asked_while_a_rank_is_lost(client, server, rank, number)
                pairs = zip(heard, expected, strict=True)
                assert [found for it, want in pairs if (found := differences(it, want))] == []
        children = psutil.Process(server.process.pid).children()
        os.kill(server.process.pid, signal.SIGTERM)
        assert await server.wait_exit() == 0
        assert not [child for child in children if child.is_running()]
        assert not [line for line in server.lines if "Traceback" in line]
