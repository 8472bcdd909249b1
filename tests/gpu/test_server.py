"""`rillgate serve` on a GPU: the right answers, also to streams whose replica is killed."""

import asyncio
import re
import signal

import pytest
import torch

from rillgate import AsyncClient
from tests.gpu.conftest import Note
from tests.support.crowd import Heard, differences, listen, undisturbed
from tests.support.served import READY, START_S, serve

MIN_HIT = 4


@pytest.mark.timeout(300)  # three starts of processes that import torch
async def test_a_server_on_the_gpu_outlives_its_replica(cuda: torch.device, note: Note) -> None:
    """The bundled model, in float32, by the device that was printed; the device is free again when
    its process was killed, and the streams go on where they were."""
    async with serve("--dtype", "float32", "--set", "replica.min_step_ms=20") as server:
        address = (await server.wait_line(READY)).group(1)
        await server.wait_line(re.compile(f"replica-0: {cuda}"))
        async with AsyncClient(address) as client:
            expected = await undisturbed(client)
            heard = [Heard(it.asked) for it in expected]
            enough = asyncio.Event()

            def count() -> None:
                if sum(it.has_token for it in heard) >= MIN_HIT:
                    enough.set()

            streams = [asyncio.create_task(listen(client, it, count)) for it in heard]
            async with asyncio.timeout(START_S):
                await enough.wait()
                server.children()["replica-0"].send_signal(signal.SIGKILL)
                await asyncio.gather(*streams)
    assert [
        it for one, want in zip(heard, expected, strict=True) if (it := differences(one, want))
    ] == []
    note(
        f"longest pause {max(max(it.pauses_s, default=0.0) for it in heard):.1f} s, with a restart"
    )
