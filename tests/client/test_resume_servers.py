"""Servers that die and come back, connections that are cut: 24 streams of either client go on."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from rillgate import AsyncClient, Client
from rillgate.testing import FakeServer
from rillgate.types import FinishReason, Generation
from tests.client.cutting_proxy import CuttingProxy

_PROMPTS = [f"{n}: " + "ü✓x" * 20 for n in range(24)]  # the fake server repeats them


def _collect_all(client: Client, on_tokens: Callable[[], None]) -> list[Generation]:
    """Run all prompts at once; call `on_tokens` when each has its first token."""
    with ThreadPoolExecutor(len(_PROMPTS)) as pool:
        streams = [client.stream(prompt) for prompt in _PROMPTS]
        list(pool.map(next, streams))
        on_tokens()
        return list(pool.map(lambda stream: stream.collect(), streams))


async def _collect_all_awaited(
    client: AsyncClient, on_tokens: Callable[[], None]
) -> list[Generation]:
    streams = [client.stream(prompt) for prompt in _PROMPTS]
    await asyncio.gather(*map(anext, streams))
    await asyncio.to_thread(on_tokens)
    return await asyncio.gather(*(stream.collect() for stream in streams))


def _run_all(
    kind: type[Client] | type[AsyncClient], target: str | list[str], on_tokens: Callable[[], None]
) -> list[Generation]:
    """Run all prompts with either client."""
    if issubclass(kind, Client):
        with kind(target) as client:
            return _collect_all(client, on_tokens)

    async def run() -> list[Generation]:
        async with AsyncClient(target) as client:
            return await _collect_all_awaited(client, on_tokens)

    return asyncio.run(run())


def _check_whole(generation: Generation, text: str) -> None:
    """Check that a result is that of a stream that never broke."""
    assert generation.text == text
    assert bytes(generation.token_ids).decode() == text
    assert generation.finish_reason is FinishReason.STOP
    assert generation.usage.completion_tokens == len(text.encode())
    assert not generation.started.resumed


def _check_all(generations: list[Generation]) -> None:
    for generation, prompt in zip(generations, _PROMPTS, strict=True):
        _check_whole(generation, prompt)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_server_restarted_on_its_port_gets_its_streams_back(
    kind: type[Client] | type[AsyncClient],
) -> None:
    """All 24 streams break and go on where they were."""
    with ExitStack() as servers:
        first = servers.enter_context(FakeServer(token_interval_s=0.01))

        def restart() -> None:
            servers.pop_all().close()
            port = int(first.target.rpartition(":")[2])
            servers.enter_context(FakeServer(port=port))

        generations = _run_all(kind, first.target, restart)
        _check_all(generations)
        assert [generation.num_resumes for generation in generations] == [1] * 24


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_when_one_of_two_servers_dies_the_other_goes_on(
    kind: type[Client] | type[AsyncClient], server: FakeServer
) -> None:
    """The streams of the dead one continue at the other; the other's never notice."""
    with ExitStack() as servers:
        dying = servers.enter_context(FakeServer(token_interval_s=0.01))
        num_open: list[int] = []

        def kill() -> None:
            num_open.append(dying.num_open)
            servers.pop_all().close()

        generations = _run_all(kind, [dying.target, server.target], kill)
        _check_all(generations)
        assert [g.num_resumes for g in generations].count(1) == num_open[0]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("seed", [1, 2])
def test_connections_cut_at_random_bytes_lose_and_repeat_nothing(
    kind: type[Client] | type[AsyncClient], seed: int
) -> None:
    """24 streams share connections that end anywhere: in a frame, a header, a handshake."""
    with (
        FakeServer(token_interval_s=0.002) as server,
        CuttingProxy(server.target, seed, max_bytes=8000) as proxy,
    ):
        generations = _run_all(kind, proxy.target, lambda: None)
        _check_all(generations)
        assert proxy.num_cuts >= 4
        assert sum(generation.num_resumes for generation in generations) >= 24
        assert server.wait_open(0)
