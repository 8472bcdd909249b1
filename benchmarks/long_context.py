"""Long contexts: decode at 4k and 8k, and prefill of a prompt of 4k, beside the machine's limits.

`python -m benchmarks.long_context` writes `results/long_context.json`. The model alone, without
scheduler or gRPC: a random checkpoint of Qwen2.5-0.5B's shape, two threads, weights in bf16 and
INT8, cache in bf16 and INT8. A cache is filled with copies of one prefill's blocks.

    bandwidth_fraction_long_*  bytes of weights and cache that a decode step reads, per second, over
                               what the machine reads
    prefill_fraction_long_*    operations of the layers and of attention's half square per second of
                               prefill, over the machine's rate for the weights' products
"""

import argparse
import itertools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare_cpu import linear_elements
from benchmarks.limits import MachineLimits, measure_limits
from benchmarks.random_checkpoint import QWEN_0_5B, make_checkpoint
from benchmarks.results_file import ROOT, write_results
from rillgate_server.config.groups import BatcherConfig
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import RowPlan, SlotStart, StepPlan
from rillgate_server.worker.attention.choice import make_attention
from rillgate_server.worker.compute_device import CPU
from rillgate_server.worker.kv_tiers import reserve_tiers
from rillgate_server.worker.kv_transfer import KVTransfer
from rillgate_server.worker.model_runner import ModelRunner
from rillgate_server.worker.worker import Worker, WorkerOptions

CHECKPOINT = ROOT / "build" / "bench" / "qwen2.5-0.5b-shape"
CONTEXTS = (4096, 8176)
"""The longer one leaves room for what is decoded, within the checkpoint's 8,192."""
STREAMS = (1, 8)
NUM_STEPS = 9
"""Decode steps of each; the first warms up."""
WEIGHTS = {"none": "bf16", "int8": "int8"}
CACHES = {"auto": "bf16", "int8": "int8"}
_WEIGHT_BYTES = {"bf16": 2, "int8": 1}
_HEAD_BYTES = 2
_SAMPLING = SamplingParams(seed=0, temperature=0.0)

Case = tuple[str, str]
"""What weights and cache are kept in."""


@dataclass
class Measured:
    """Samples of one case."""

    prefill_s: list[float]
    decode_s: dict[tuple[int, int], list[float]]
    """(context, streams) -> seconds per step."""
    cache_bytes_per_token: float


class LongContext:
    """A model with a cache for the most streams of the longest context. State: its blocks."""

    def __init__(self, model_dir: Path, quantization: str, kv_dtype: str) -> None:
        """Load it."""
        options = WorkerOptions(num_threads=2, quantization=quantization, kv_dtype=kv_dtype)
        worker = Worker.load(model_dir, options)
        self._block_size = worker.layout.block_size_tokens
        self._per_stream = -(-(CONTEXTS[-1] + NUM_STEPS) // self._block_size)
        tiers = reserve_tiers(worker.layout, self._per_stream * max(STREAMS), 0, CPU)
        self._bytes = tiers.device.bytes
        self._runner = ModelRunner(
            worker.network,
            make_attention(tiers.device, torch.bfloat16),
            tiers.device,
            KVTransfer(tiers),
            worker.spec.vocab_size,
        )
        self._step_ids = itertools.count()
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(2, worker.spec.vocab_size, (CONTEXTS[-1],), generator=generator)
        self._prompt = tuple(prompt.tolist())
        self.cache_bytes_per_token = worker.layout.block_bytes / self._block_size

    def close(self) -> None:
        """End the runner."""
        self._runner.close()

    def prefill(self, num_tokens: int) -> float:
        """Compute the prompt's first tokens into the first stream's blocks. Returns seconds."""
        chunk = BatcherConfig().max_step_tokens
        begin = time.perf_counter()
        for start in range(0, num_tokens, chunk):
            count = min(chunk, num_tokens - start)
            row = RowPlan(0, start, count, samples=start + count == num_tokens)
            starts = () if start else (self._start(0, num_tokens),)
            self._execute(starts, (row,))
        seconds = time.perf_counter() - begin
        self._execute((), (), ended=(0,))
        return seconds

    def fill(self) -> None:
        """Prefill the shorter context and copy its blocks all over: each stream reads its own."""
        self.prefill(CONTEXTS[0])
        num_blocks = CONTEXTS[0] // self._block_size
        for first in range(num_blocks, len(self._bytes), num_blocks):
            part = self._bytes[first : first + num_blocks]
            part.copy_(self._bytes[: len(part)])

    def decode(self, context: int, streams: int) -> list[float]:
        """Return the seconds of some steps."""
        starts = tuple(self._start(slot, context) for slot in range(streams))
        seconds = []
        for number in range(NUM_STEPS):
            rows = tuple(RowPlan(slot, context - 1 + number, 1) for slot in range(streams))
            begin = time.perf_counter()
            self._execute(() if number else starts, rows)
            seconds.append(time.perf_counter() - begin)
        self._execute((), (), ended=tuple(range(streams)))
        return seconds[1:]

    def _start(self, slot: int, num_tokens: int) -> SlotStart:
        first = slot * self._per_stream
        table = tuple(range(first, first + self._per_stream))
        return SlotStart(slot, self._prompt[:num_tokens], num_tokens, table, _SAMPLING, 0)

    def _execute(
        self,
        starts: tuple[SlotStart, ...],
        rows: tuple[RowPlan, ...],
        ended: tuple[int, ...] = (),
    ) -> None:
        self._runner.execute(StepPlan(next(self._step_ids), starts, rows, ended))


def measure(num_rounds: int) -> tuple[dict[Case, Measured], list[MachineLimits]]:
    """Measure case by case, each between two measurements of the limits."""
    model_dir = make_checkpoint(CHECKPOINT, QWEN_0_5B, torch.bfloat16)
    found: dict[Case, Measured] = {}
    limits = [measure_limits()]
    for quantization, weights in WEIGHTS.items():
        for kv_dtype, cache in CACHES.items():
            model = LongContext(model_dir, quantization, kv_dtype)
            measured = Measured([], {}, model.cache_bytes_per_token)
            model.fill()
            for _ in range(num_rounds):
                for context, streams in itertools.product(CONTEXTS, STREAMS):
                    samples = measured.decode_s.setdefault((context, streams), [])
                    samples.extend(model.decode(context, streams))
                measured.prefill_s.append(model.prefill(CONTEXTS[0]))
            model.close()
            found[weights, cache] = measured
            limits.append(measure_limits())
    return found, limits


def rows_of(found: dict[Case, Measured], limits: list[MachineLimits]) -> list[dict[str, Any]]:
    """One row per case and length, then the machine's limits. Any: JSON."""
    rows: list[dict[str, Any]] = []
    for (weights, cache), measured in found.items():
        case = {"weights": weights, "cache": cache}
        rate = CONTEXTS[0] / statistics.median(measured.prefill_s)
        rows.append(
            {
                **case,
                "prompt_tokens": CONTEXTS[0],
                "prefill_tokens_per_s": round(rate, 1),
                "samples": [round(it, 4) for it in measured.prefill_s],
            }
        )
        rows += [
            {
                **case,
                "context_tokens": context,
                "streams": streams,
                "decode_tokens_per_s": round(streams / statistics.median(steps_s), 1),
                "samples": [round(it, 5) for it in steps_s],
            }
            for (context, streams), steps_s in measured.decode_s.items()
        ]
    samples = [
        [round(it.read_bytes_per_s), round(it.bf16_ops_per_s), round(it.int8_ops_per_s)]
        for it in limits
    ]
    return [*rows, {"weights": "machine limits", "samples": samples}]


def ratios_of(found: dict[Case, Measured], limits: list[MachineLimits]) -> dict[str, float]:
    """Take each case over the limits measured right before and after it."""
    layers, head = linear_elements(QWEN_0_5B)
    hidden, num_layers = QWEN_0_5B["hidden_size"], QWEN_0_5B["num_hidden_layers"]
    attention_ops = 2 * CONTEXTS[0] ** 2 * hidden * num_layers
    ratios = {}
    for ((weights, cache), measured), pair in zip(
        found.items(), itertools.pairwise(limits), strict=True
    ):
        name = f"{weights}_cache_{cache}"
        read_rate = max(it.read_bytes_per_s for it in pair)
        for (context, streams), steps_s in measured.decode_s.items():
            num_bytes = layers * _WEIGHT_BYTES[weights] + head * _HEAD_BYTES
            num_bytes += int(streams * context * measured.cache_bytes_per_token)
            ratios[f"bandwidth_fraction_long_{name}_{context}_{streams}"] = (
                num_bytes / statistics.median(steps_s) / read_rate
            )
        rates = [it.int8_ops_per_s if weights == "int8" else it.bf16_ops_per_s for it in pair]
        operations = 2 * layers * CONTEXTS[0] + attention_ops
        ratios[f"prefill_fraction_long_{name}_{CONTEXTS[0]}"] = (
            operations / statistics.median(measured.prefill_s) / max(rates)
        )
    return ratios


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="decode and prefill of long contexts")
    parser.add_argument("--rounds", type=int, default=2)
    num_rounds = parser.parse_args().rounds
    torch.set_num_threads(2)
    found, limits = measure(num_rounds)
    rows, ratios = rows_of(found, limits), ratios_of(found, limits)
    for row in rows:
        print({key: value for key, value in row.items() if key != "samples"})
    for name, value in ratios.items():
        print(f"{name}: {value:.3f}")
    command = f"python -m benchmarks.long_context --rounds {num_rounds}"
    print(write_results("long_context", command, rows, ratios).name)


if __name__ == "__main__":
    main()
