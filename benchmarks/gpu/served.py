"""Through gRPC: `rillgate serve` with the checkpoint on disk, called from processes of their own.

The same requests as the engine alone had; a closed loop of users; and all users at one moment.
"""

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contestants.protocol import Contestant, Message
from benchmarks.gpu.power import EnergyLog, energy_log
from benchmarks.gpu.prompts import staggered_lens
from benchmarks.gpu.requests import REQUESTS, request_row
from benchmarks.gpu.rows import Row, distribution_ms
from benchmarks.gpu.scale import Scale, as_flags

FIRST_TOKENS = 16
"""The first of an answer that a user reads: about a sentence."""
_CLIENT = "benchmarks.gpu.client_process"
_READY = re.compile(r"rillgate: serving .* on (\S+) \(ready after")
_LEAD_S = 0.5
"""Until the agreed moment: all processes have made their prompts and connected by then."""
_STOP_S = 20.0


@dataclass(frozen=True, slots=True)
class Served:
    """A running server, and the processes that call it."""

    address: str
    clients: tuple[Contestant, ...]
    energy: EnergyLog

    def ask(self, mode: str, scale: Scale, shares: Sequence[Message]) -> list[list[float]]:
        """Let each process do its share; return the times of all streams."""
        common: Message = {
            "mode": mode,
            "target": self.address,
            "vocab_size": scale.large.vocab_size,
            "nth_token": FIRST_TOKENS,
        }
        with ThreadPoolExecutor(len(self.clients)) as pool:
            answers = pool.map(
                lambda it: it[0].tell(common | it[1]), zip(self.clients, shares, strict=True)
            )
        return [times for answer in answers for times in answer["streams"]]

    def streams(
        self, scale: Scale, seed: str, prompt_tokens: int, output_lens: Sequence[int]
    ) -> list[list[float]]:
        """Send all at one moment."""
        begin_s = time.monotonic() + _LEAD_S
        count, num = len(output_lens), len(self.clients)
        shares: list[Message] = [
            {
                "seed": seed,
                "numbers": list(range(first, count, num)),
                "output_tokens": list(output_lens[first::num]),
                "prompt_tokens": prompt_tokens,
                "begin_s": begin_s,
            }
            for first in range(num)
        ]
        return self.ask("streams", scale, shares)


@contextlib.contextmanager
def open_server(work_dir: Path, scale: Scale) -> Iterator[Served]:
    """Start a server and its callers, and warm both up; end them afterwards."""
    with contextlib.ExitStack() as stack:
        flags = as_flags(scale.settings())
        address = stack.enter_context(serving(work_dir / scale.large.name, flags))
        clients = []
        for _ in range(scale.clients):
            clients.append(Contestant(_CLIENT, ()))
            stack.callback(clients[-1].close)
        served = Served(address, tuple(clients), stack.enter_context(energy_log()))
        lens = staggered_lens(scale.batches[-1])
        served.streams(scale, "warm-up", scale.user_prompt_tokens, lens)
        yield served


@contextlib.contextmanager
def serving(model_dir: Path, flags: Sequence[str]) -> Iterator[str]:
    """Run `rillgate serve` on a free port, and return its address once it is ready.

    Raises RuntimeError with its last words where it ends instead.
    """
    command = [sys.executable, "-m", "rillgate_server.cli", "serve", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        [*command, "--model", str(model_dir), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        last: deque[str] = deque(maxlen=20)
        reader = threading.Thread(target=last.extend, args=(process.stdout,))
        try:
            match = None
            while match is None:
                line = process.stdout.readline()
                if not line:
                    raise RuntimeError("the server ended:\n" + "".join(last))
                last.append(line)
                match = _READY.search(line)
            reader.start()  # empties its output, so that it is never held up
            yield match.group(1)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
            if reader.ident is not None:
                reader.join()


def describe(served: Served, seconds: float) -> Row:
    """Say how long it took until the server was warm."""
    return {
        "what": "load",
        "clients": len(served.clients),
        "seconds": round(seconds, 2),
        "samples": [seconds],
    }


def measure_requests(served: Served, scale: Scale) -> Iterator[Row]:
    """Send the largest batch's requests at once: the engine alone had the same ones."""
    count = scale.batches[-1]
    lens = [scale.request_output_tokens] * count
    streams = served.streams(scale, REQUESTS.format(count), scale.request_prompt_tokens, lens)
    begin_s, end_s = min(it[0] for it in streams), max(it[3] for it in streams)
    row = request_row("through gRPC", scale, count, sum(lens), end_s - begin_s)
    joules = served.energy.joules(begin_s, end_s)
    row["joules_per_token"] = round(joules / sum(lens), 4) if joules else None
    row["first_token_ms"] = distribution_ms([it[1] - it[0] for it in streams])
    yield row


def measure_users(served: Served, scale: Scale) -> Iterator[Row]:
    """Let users ask in a closed loop; what they send in the steady state counts."""
    begin_s, num = time.monotonic() + _LEAD_S, len(served.clients)
    steady_s = begin_s + scale.ramp_s
    end_s = steady_s + scale.steady_s
    shares: list[Message] = [
        {
            "seed": "users",
            "users": list(range(first, scale.users, num)),
            "prompt_tokens": scale.user_prompt_tokens,
            "output_tokens": scale.user_output_tokens,
            "think_s": scale.think_s,
            "begin_s": begin_s,
            "ramp_s": scale.ramp_s / 2,
            "end_s": end_s,
        }
        for first in range(num)
    ]
    streams = served.ask("users", scale, shares)
    yield waits_row("users", scale, [it for it in streams if steady_s <= it[0] < end_s])


def measure_burst(served: Served, scale: Scale) -> Iterator[Row]:
    """Let all users ask at one moment."""
    lens = [scale.user_output_tokens] * scale.users
    streams = served.streams(scale, "burst", scale.user_prompt_tokens, lens)
    yield waits_row("burst", scale, streams)


def waits_row(what: str, scale: Scale, streams: Sequence[Sequence[float]]) -> Row:
    """Return the distributions of how long callers waited. Raises RuntimeError without any."""
    if not streams:
        raise RuntimeError("nobody asked in the steady state")
    first_s = [it[1] - it[0] for it in streams]
    nth_s = [it[2] - it[0] for it in streams]
    samples: list[Any] = [[round(s, 4) for s in pair] for pair in zip(first_s, nth_s, strict=True)]
    return {
        "what": what,
        "users": scale.users,
        "prompt_tokens": scale.user_prompt_tokens,
        "output_tokens": scale.user_output_tokens,
        "num_requests": len(streams),
        "first_token_ms": distribution_ms(first_s),
        f"first_{FIRST_TOKENS}_tokens_ms": distribution_ms(nth_s),
        "answer_ms": distribution_ms([it[3] - it[0] for it in streams]),
        "samples": samples,
    }
