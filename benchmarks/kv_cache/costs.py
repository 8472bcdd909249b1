"""What steps and copies cost on a machine, recorded from a real run and fitted all at once.

Owns the recording, its file and the fit; the simulator takes its true costs from here. The fit is
another one than the server's (kvcache.cost_model), which is judged by it.
"""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.kv_cache.copies import CopySpeed
from rillgate_server.core.step import CopyDirection, StepPlan, StepResult
from rillgate_server.engine.executor import Executor
from rillgate_server.kvcache.cost_model import StepWork

RECORDING = Path(__file__).with_name("recorded_costs.json")
MAX_SAMPLES = 500
"""Of each kind in the file, drawn at random: it stays small."""

Sizes = tuple[float, ...]
Sample = tuple[Sizes, float]
"""(sizes, seconds)."""


def work_of(plan: StepPlan) -> StepWork:
    """Count what a plan computes. A row of one token that samples is a decoding one."""
    prefill_tokens = prefill_context = decode_rows = decode_context = 0
    for row in plan.rows:
        if row.num_tokens == 1 and row.samples:
            decode_rows += 1
            decode_context += row.start + 1
        else:
            count = row.num_tokens
            prefill_tokens += count
            prefill_context += count * row.start + count * (count + 1) // 2
    return StepWork(prefill_tokens, prefill_context, decode_rows, decode_context)


def step_sizes(work: StepWork) -> Sizes:
    """Return what each of the five costs of a step is multiplied by."""
    return (
        1.0,
        float(work.num_prefill_tokens),
        float(work.num_prefill_context),
        float(work.num_decode_rows),
        float(work.num_decode_context),
    )


@dataclass(slots=True)
class Recording:
    """Samples of steps, and of copies by direction."""

    block_bytes: int
    steps: list[Sample] = field(default_factory=list)
    copies: dict[CopyDirection, list[Sample]] = field(
        default_factory=lambda: {direction: [] for direction in CopyDirection}
    )

    def save(self, path: Path = RECORDING) -> None:
        """Write a random part of the samples."""
        draw = random.Random(0)

        def part(samples: list[Sample]) -> list[list[float]]:
            chosen = draw.sample(samples, min(len(samples), MAX_SAMPLES))
            return [[*sizes, round(seconds, 7)] for sizes, seconds in chosen]

        copies = {direction.value: part(samples) for direction, samples in self.copies.items()}
        content = {"block_bytes": self.block_bytes, "steps": part(self.steps), "copies": copies}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path = RECORDING) -> "Recording":
        """Read what `save` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))

        def samples(rows: list[list[float]]) -> list[Sample]:
            return [(tuple(row[:-1]), row[-1]) for row in rows]

        copies = {
            direction: samples(content["copies"][direction.value]) for direction in CopyDirection
        }
        return cls(content["block_bytes"], samples(content["steps"]), copies)


class RecordingExecutor:
    """Passes plans on and records what steps and copies took."""

    def __init__(self, executor: Executor, recording: Recording) -> None:
        """Record into `recording`."""
        self._executor = executor
        self._recording = recording
        self._directions: dict[int, CopyDirection] = {}  # copy id -> its direction

    def execute(self, plan: StepPlan) -> StepResult:
        """Execute one plan."""
        for job in plan.copies:
            self._directions[job.copy_id] = job.direction
        begin = time.perf_counter()
        result = self._executor.execute(plan)
        seconds = time.perf_counter() - begin
        if plan.rows:
            self._recording.steps.append((step_sizes(work_of(plan)), seconds))
        for done in result.finished_copies:
            direction = self._directions.pop(done.copy_id)
            if done.num_bytes and not done.failed_pairs:
                sample = ((1.0, float(done.num_bytes)), done.seconds)
                self._recording.copies[direction].append(sample)
        return result


@dataclass(frozen=True, slots=True)
class TrueCosts:
    """What the simulator's steps and copies take."""

    block_bytes: int
    step_costs: Sizes
    """Seconds per size (`step_sizes`)."""
    step_noise: Sizes
    """Measured over fitted, of every recorded step: steps vary as they did."""
    load: CopySpeed
    store: CopySpeed

    @classmethod
    def fit(cls, recording: Recording) -> "TrueCosts":
        """Fit all samples of a recording."""
        costs = fit(recording.steps)
        noise = tuple(seconds / _predict(costs, sizes) for sizes, seconds in recording.steps)
        speeds = {
            direction: _copy_speed(fit(samples)) for direction, samples in recording.copies.items()
        }
        return cls(
            recording.block_bytes,
            costs,
            noise,
            load=speeds[CopyDirection.HOST_TO_DEVICE],
            store=speeds[CopyDirection.DEVICE_TO_HOST],
        )

    def step_s(self, work: StepWork) -> float:
        """Return what a step takes on average."""
        return _predict(self.step_costs, step_sizes(work))

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens per second of a chunk of 512 at the beginning."""
        return 512 / self.step_s(StepWork(512, 512 * 513 // 2))


def fit(samples: Sequence[Sample]) -> Sizes:
    """Fit non-negative costs to seconds by least squares of the relative errors.

    Coordinate descent until nothing moves. Samples that are off by more than a factor of 3 are
    left out of a second fit: during these the process was not scheduled.
    """
    costs = _fit_once(samples)
    kept = [
        (sizes, seconds)
        for sizes, seconds in samples
        if _predict(costs, sizes) / 3 < seconds < 3 * _predict(costs, sizes)
    ]
    return _fit_once(kept)


def _fit_once(samples: Sequence[Sample]) -> Sizes:
    num_costs = len(samples[0][0])
    rows = [[size / seconds for size in sizes] for sizes, seconds in samples]
    products = [
        [sum(row[i] * row[j] for row in rows) for j in range(num_costs)] for i in range(num_costs)
    ]
    sums = [sum(row[i] for row in rows) for i in range(num_costs)]
    costs = [0.0] * num_costs
    for _ in range(5000):
        for i, row in enumerate(products):
            if row[i] > 0.0:
                explained = sum(a * b for a, b in zip(row, costs, strict=True))
                costs[i] = max(0.0, costs[i] + (sums[i] - explained) / row[i])
    return tuple(costs)


def _predict(costs: Sizes, sizes: Sizes) -> float:
    return sum(cost * size for cost, size in zip(costs, sizes, strict=True))


def _copy_speed(costs: Sizes) -> CopySpeed:
    latency_s, second_per_byte = costs
    return CopySpeed(latency_s, 1.0 / second_per_byte if second_per_byte else float("inf"))
