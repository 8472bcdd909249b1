"""Rillgate as its users run it: `rillgate serve` in processes of its own, called over gRPC."""

import asyncio
import itertools
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from benchmarks.contestants.decode_rate import steady_decode_rate
from benchmarks.contestants.protocol import Message
from rillgate import AsyncClient, Client
from rillgate.types import Usage
from rillgate_server.core.model_spec import NO_QUANTIZATION

_SAMPLE_PERIOD_S = 0.05
_SAMPLES_PER_LISTING = 40
"""Listing all processes takes 10 ms of the cores that are measured; a sample takes 0.1."""
_CACHE_BYTES = 256 << 20
"""All 32 requests fit, and the rounds touch every block: a cache that is never filled would hide
what else the replica takes."""


class RillgateContestant:
    """A running server, and the memory of its replica."""

    def __init__(self, model_dir: str, quantization: str = NO_QUANTIZATION) -> None:
        """Name the checkpoint; `with` starts and stops the server."""
        self._model_dir = model_dir
        self._quantization = quantization
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._target = f"127.0.0.1:{probe.getsockname()[1]}"
        self._peak_bytes: list[int] = [0]
        self._stop = threading.Event()
        self._is_ready = False

    def __enter__(self) -> "RillgateContestant":
        """Start the server and wait until it takes requests."""
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "rillgate_server.cli", "serve"),
                *("--listen", self._target, "--model", self._model_dir),
                *("--quantization", self._quantization),
                *("--set", f"cache.device_memory={_CACHE_BYTES}"),
            ],
            stdout=sys.stderr,
        )
        self._sampler = threading.Thread(target=self._sample_memory)
        self._sampler.start()
        try:
            with Client(self._target) as client:
                client.wait_ready(timeout_s=120)
        except BaseException:
            self._end()
            raise
        self._is_ready = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the server."""
        self._end()

    def _end(self) -> None:
        self._stop.set()
        self._sampler.join()
        self._process.terminate()
        self._process.wait(timeout=30)

    async def ask(self, prompts: Sequence[Sequence[int]], num_output_tokens: int) -> Message:
        """Send all prompts at once; count the tokens that arrive, by their ids."""
        async with AsyncClient(self._target) as client:
            await client.models()  # connects before the clock runs
            begin = time.perf_counter()
            received = await asyncio.gather(
                *(_receive(client, prompt, num_output_tokens) for prompt in prompts)
            )
            seconds = time.perf_counter() - begin
        return {
            "seconds": seconds,
            "num_output_tokens": sum(len(one.arrivals) for one in received),
            "decode_tokens_per_s": steady_decode_rate([one.arrivals for one in received]),
            "ttft_s": sorted(one.ttft_s for one in received)[len(received) // 2],
            "cached_tokens": sum(one.usage.cached_tokens for one in received),
            "preemptions": sum(one.usage.num_preemptions for one in received),
        }

    def memory_row(self, weights: int | None = None) -> Message:
        """Say what the replica took at most, beside its cache and the bytes of its weights.

        None: the checkpoint's.
        """
        if weights is None:
            files = Path(self._model_dir).glob("*.safetensors")
            weights = sum(path.stat().st_size for path in files)
        return {
            "contestant": "rillgate replica memory",
            "peak_anonymous_mb": round(max(self._peak_bytes) / 1e6, 1),
            "weights_mb": round(weights / 1e6, 1),
            "cache_mb": round(_CACHE_BYTES / 1e6, 1),
            "beyond_weights_and_cache_mb": round(
                (max(self._peak_bytes) - weights - _CACHE_BYTES) / 1e6, 1
            ),
            "samples": [max(self._peak_bytes)],
        }

    def _sample_memory(self) -> None:
        """Note RssAnon + RssShmem of the largest child, loading included, until told to stop."""
        pids: list[int] = []
        for number in itertools.count():
            if self._stop.wait(_SAMPLE_PERIOD_S):
                return
            if not self._is_ready or number % _SAMPLES_PER_LISTING == 0:
                children = psutil.Process(self._process.pid).children(recursive=True)
                pids = [child.pid for child in children]
            self._peak_bytes[0] = max(self._peak_bytes[0], *map(_anonymous_bytes, pids), 0)


@dataclass(frozen=True, slots=True)
class _Received:
    """One stream, as the client saw it."""

    arrivals: Sequence[float]
    """When each token came, in seconds."""
    ttft_s: float
    """Seconds until its first token."""
    usage: Usage


async def _receive(client: AsyncClient, prompt: Sequence[int], num_output_tokens: int) -> _Received:
    """Read one stream to its end."""
    begin = time.perf_counter()
    arrivals: list[float] = []
    usage = None
    stream = client.stream(
        list(prompt), max_tokens=num_output_tokens, ignore_eos=True, temperature=0.0
    )
    async for chunk in stream:
        arrivals += [time.perf_counter()] * len(chunk.token_ids)
        usage = chunk.usage or usage
    assert usage is not None, "a stream without an end"
    return _Received(arrivals, arrivals[0] - begin, usage)


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it ended between the listing and the reading
    fields = dict(line.split(":", 1) for line in lines)
    names = [name for name in ("RssAnon", "RssShmem") if name in fields]  # none of one that ends
    return sum(int(fields[name].split()[0]) * 1024 for name in names)
