"""Rillgate's engine without gRPC, gateway or text: what the whole path is measured against."""

import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contestants.protocol import Message, serve
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
        """Run all prompts at once through the engine."""
        self._worker.forget()
        begin = time.perf_counter()
        for prompt in request["prompts"]:
            self._add(prompt, request["num_output_tokens"], begin)
        num_output_tokens = 0
        while self._scheduler.has_work:
            output = self._engine.step()
            if output is not None:
                num_output_tokens += sum(len(entry.token_ids) for entry in output.tokens)
        return {
            "seconds": time.perf_counter() - begin,
            "num_output_tokens": num_output_tokens,
            "decode_step_s": statistics.median(self._worker.decode_s),
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
    serve(EngineContestant(sys.argv[1]).answer)
