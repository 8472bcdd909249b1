"""Rillgate's engine without gRPC, gateway or text: what the whole path is measured against."""

import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contestants.protocol import Message, serve
from benchmarks.contestants.step_parts import StepParts
from rillgate_server.config.groups import BatcherConfig, CacheConfig
from rillgate_server.core.clock import SystemClock
from rillgate_server.core.model_spec import NO_QUANTIZATION, CacheSizes
from rillgate_server.core.request import ChoiceStart, Request
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import StepPlan, StepResult
from rillgate_server.engine.engine import Engine
from rillgate_server.scheduler.scheduler import Scheduler
from rillgate_server.worker.worker import Worker, WorkerOptions

_NUM_BLOCKS = 2048


class _TimedWorker:
    """Passes plans on and notes how long each took, by kind."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.parts: StepParts | None = None
        """Who wants to know where the time goes."""
        self.total_s = 0.0
        """Of all steps ever."""
        self.forget()

    def forget(self) -> None:
        """Start measuring anew."""
        self.decode_s: list[float] = []
        """Steps in which every row has one token."""
        self.prefill_s = 0.0
        self.num_prefill_tokens = 0

    def execute(self, plan: StepPlan) -> StepResult:
        begin = time.perf_counter()
        result = self._worker.execute(plan)
        seconds = time.perf_counter() - begin
        num_tokens = sum(row.num_tokens for row in plan.rows)
        self.total_s += seconds
        if self.parts is not None:
            self.parts.note_step(seconds, is_decode=num_tokens == len(plan.rows))
        if num_tokens == len(plan.rows):
            self.decode_s.append(seconds)
        else:
            self.prefill_s += seconds
            self.num_prefill_tokens += num_tokens
        return result


class EngineContestant:
    """One engine with one worker, loaded once."""

    def __init__(self, model_dir: str, quantization: str = NO_QUANTIZATION) -> None:
        """Load the checkpoint and allocate the cache."""
        options = WorkerOptions(num_threads=2, quantization=quantization)
        worker = Worker.load(Path(model_dir), options)
        worker.allocate_cache(_NUM_BLOCKS)
        self._worker = _TimedWorker(worker)
        sizes = CacheSizes(_NUM_BLOCKS, worker.layout.block_bytes, worker.spec.dtype)
        self._scheduler = Scheduler(BatcherConfig(), CacheConfig(), worker.spec, sizes)
        self._engine = Engine(self._scheduler, self._worker, SystemClock())
        self._request_ids = itertools.count()

    def answer(self, request: Message) -> Message:
        """Run all prompts at once through the engine.

        Mode `parts` says instead what a decode step's time goes into.
        """
        self._worker.forget()
        if request["mode"] == "parts":
            return self._parts_of_a_step(request)
        return self._run(request)

    def _parts_of_a_step(self, request: Message) -> Message:
        """Run it with clocks around the kernels; milliseconds, medians over the decode steps.

        `python_ms`: scheduling and the engine's loop, outside the worker.
        """
        with StepParts() as parts:
            self._worker.parts = parts
            whole = self._run(request)
            self._worker.parts = None
        return whole | parts.medians_ms()

    def _run(self, request: Message) -> Message:
        begin = time.perf_counter()
        for prompt in request["prompts"]:
            self._add(prompt, request["num_output_tokens"], begin)
        num_output_tokens = 0
        outside_s: list[float] = []
        while self._scheduler.has_work:
            step_begin, computed_s = time.perf_counter(), self._worker.total_s
            output = self._engine.step()
            in_worker_s = self._worker.total_s - computed_s
            outside_s.append(time.perf_counter() - step_begin - in_worker_s)
            if output is not None:
                num_output_tokens += sum(len(entry.token_ids) for entry in output.tokens)
        return {
            "seconds": time.perf_counter() - begin,
            "num_output_tokens": num_output_tokens,
            "decode_tokens_per_s": len(request["prompts"])
            / statistics.median(self._worker.decode_s),
            "decode_step_s": statistics.median(self._worker.decode_s),
            "python_ms": statistics.median(outside_s) * 1e3,
            "prefill_tokens_per_s": self._worker.num_prefill_tokens / self._worker.prefill_s,
        }

    def _add(self, prompt: Sequence[int], num_output_tokens: int, now: float) -> None:
        rejection = self._scheduler.add(
            Request(
                request_id=next(self._request_ids),
                prompt_token_ids=tuple(prompt),
                choices=(ChoiceStart(0),),
                sampling=SamplingParams(seed=0, temperature=0.0),
                max_tokens=num_output_tokens,
            ),
            now,
        )
        assert rejection is None, rejection


if __name__ == "__main__":
    serve(EngineContestant(*sys.argv[1:]).answer)
