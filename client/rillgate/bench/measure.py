"""Sends a benchmark's requests and notes when tokens came back.

Owns the clock readings. Deliberately below `AsyncClient`: it counts token ids in the protocol's
messages and makes no value per chunk, so that the measuring costs little of what it measures. Never
retries: a refused request is a result.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from rillgate._channel import ChannelPlan
from rillgate._convert_request import generate_request
from rillgate._methods import GENERATE
from rillgate.bench.workload import BenchRequest
from rillgate.types import GenerateOptions
from rillgate_proto.v1 import inference_pb2


@dataclass(frozen=True, slots=True)
class Sample:
    """One request as its caller saw it; times are seconds since the series began."""

    sent_s: float
    first_token_s: float | None
    """None: no token came."""
    last_token_s: float | None
    num_output_tokens: int
    """Counted from the ids that came."""
    num_prompt_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    max_gap_s: float
    """Longest time between two messages with tokens."""
    error: str
    """Empty: it ended well. Else the status."""


@dataclass(frozen=True, slots=True)
class Series:
    """Requests to send together."""

    requests: Sequence[BenchRequest]
    max_concurrency: int | None
    """Requests open at once; the next goes when one ends. None: no limit."""
    arrivals_s: Sequence[float] | None = None
    """When each may go, from the start; None: at once."""
    model: str = ""
    timeout_s: float | None = None
    """Deadline of each request; it is part of what the server schedules by."""


async def measure(
    plan: ChannelPlan,
    series: Series,
    on_done: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Sample]:
    """Send all requests of a series; samples come in the requests' order.

    The connection is made before the clock starts. Raises grpc.aio.AioRpcError when that fails.
    """
    channel = (
        grpc.aio.insecure_channel(plan.target, plan.options)
        if plan.credentials is None
        else grpc.aio.secure_channel(plan.target, plan.credentials, plan.options)
    )
    async with channel:
        await channel.channel_ready()
        return await _Run(channel, series, on_done, clock).run()


class _Run:
    """One series under way: owns the start time and the free places."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        series: Series,
        on_done: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._call = channel.unary_stream(GENERATE.path, GENERATE.serialize, GENERATE.deserialize)
        self._series = series
        self._on_done = on_done
        self._clock = clock
        # Made beforehand: building messages is no part of the load.
        self._messages = [_to_message(request, series.model) for request in series.requests]
        self._places = asyncio.Semaphore(series.max_concurrency or max(1, len(self._messages)))
        self._began_s = 0.0

    async def run(self) -> list[Sample]:
        self._began_s = self._clock()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._one(i)) for i in range(len(self._messages))]
        return [task.result() for task in tasks]

    def _now_s(self) -> float:
        return self._clock() - self._began_s

    async def _one(self, index: int) -> Sample:
        if self._series.arrivals_s is not None:
            await asyncio.sleep(self._series.arrivals_s[index] - self._now_s())
        async with self._places:
            sample = await self._send(self._messages[index])
        self._on_done()
        return sample

    async def _send(self, message: inference_pb2.GenerateRequest) -> Sample:
        sent_s = self._now_s()
        first_s: float | None = None
        last_s: float | None = None
        num_tokens = 0
        max_gap_s = 0.0
        num_prompt_tokens = 0
        usage = inference_pb2.Usage()
        error = ""
        try:
            async for response in self._call(message, timeout=self._series.timeout_s):
                num_new = sum(len(output.token_ids) for output in response.outputs)
                if num_new:
                    now_s = self._now_s()
                    if last_s is None:
                        first_s = now_s
                    else:
                        max_gap_s = max(max_gap_s, now_s - last_s)
                    last_s = now_s
                    num_tokens += num_new
                if response.HasField("started"):
                    num_prompt_tokens = response.started.num_prompt_tokens
                for finished in response.finished:
                    usage = finished.usage
        except grpc.aio.AioRpcError as rpc_error:
            error = f"{rpc_error.code().name}: {rpc_error.details()}"
        return Sample(
            sent_s=sent_s,
            first_token_s=first_s,
            last_token_s=last_s,
            num_output_tokens=num_tokens,
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=usage.cached_tokens,
            num_preemptions=usage.num_preemptions,
            max_gap_s=max_gap_s,
            error=error,
        )


def _to_message(request: BenchRequest, model: str) -> inference_pb2.GenerateRequest:
    options = GenerateOptions(max_tokens=request.max_tokens)
    if request.ignore_eos:
        options["ignore_eos"] = True
    if model:
        options["model"] = model
    return generate_request(request.prompt, options)
