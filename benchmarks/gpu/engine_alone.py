"""The engine without gRPC, gateway or text: a scheduler and a worker as a replica has them.

Loads as the replica does (replica.process.load_whole), so the cache has the size that would be
served. Notes each step from outside: when its output came, and which contexts it had.
"""

import contextlib
import gc
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.power import EnergyLog, energy_log
from benchmarks.gpu.prompts import prompts, staggered_lens
from benchmarks.gpu.rows import Row
from benchmarks.gpu.scale import Scale, Shape
from rillgate_server.config.settings import load_settings
from rillgate_server.core.clock import SystemClock
from rillgate_server.core.request import ChoiceStart, Request
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import StepOutput, StepResult, StepTimes
from rillgate_server.engine.engine import Engine
from rillgate_server.replica.process import ReadyModel, load_whole
from rillgate_server.scheduler.scheduler import Scheduler
from rillgate_server.worker.compute_device import find_device

_WARM_PROMPT_TOKENS = 8


@dataclass(frozen=True, slots=True)
class StepNote:
    """A step, when its output had come."""

    end_s: float
    """On the monotonic clock."""
    num_tokens: int
    num_choices: int
    """Which got tokens."""
    least_offset: int
    """Fewest tokens that one of them had before; 0: one got its first."""
    context_tokens: int
    """Keys that those rows attended to, all together."""
    idle_s: float | None
    """The device's, within the step; None where the worker does not say."""


@dataclass(frozen=True, slots=True)
class EngineRun:
    """Requests from their arrival, all at once, to the last token."""

    begin_s: float
    notes: tuple[StepNote, ...]

    @property
    def seconds(self) -> float:
        """From the first request's arrival to the last token."""
        return self.notes[-1].end_s - self.begin_s

    @property
    def num_tokens(self) -> int:
        """Of all answers."""
        return sum(note.num_tokens for note in self.notes)

    def steady(self, batch: int) -> tuple[StepNote, ...]:
        """Return the steps in which all of a batch decode: nobody's first token, one each."""
        return tuple(
            note
            for note in self.notes
            if note.num_choices == batch == note.num_tokens and note.least_offset > 0
        )


class _NotingScheduler(Scheduler):
    """Keeps the times of the newest result, wherever in the engine it comes from."""

    newest_times = StepTimes()

    def update(self, result: StepResult, now: float) -> StepOutput:
        """Note and apply."""
        self.newest_times = result.times
        return super().update(result, now)


class LoadedEngine:
    """One loaded model with its engine. State: what the scheduler and the worker hold."""

    def __init__(self, ready: ReadyModel, scale: Scale, shape: Shape, quantization: str) -> None:
        """Drive `ready`, which was loaded with the scale's settings."""
        settings = load_settings(overrides=scale.settings(quantization))
        self.shape = shape
        self.quantization = quantization
        self._scheduler = _NotingScheduler(
            settings.batcher, settings.cache, ready.spec, ready.sizes, settings.speculation
        )
        self._engine = Engine(self._scheduler, ready.executor, SystemClock())
        self._request_ids = itertools.count()
        self.energy = EnergyLog()

    def run(self, given: Sequence[Sequence[int]], output_lens: Sequence[int]) -> EngineRun:
        """Answer all prompts, each with exactly so many tokens, drawn greedily."""
        prompt_lens: dict[int, int] = {}
        begin_s = time.monotonic()
        for prompt, num_tokens in zip(given, output_lens, strict=True):
            request_id = next(self._request_ids)
            prompt_lens[request_id] = len(prompt)
            self._add(request_id, prompt, num_tokens, begin_s)
        notes: list[StepNote] = []
        while self._scheduler.has_work:
            output = self._engine.step()
            if output is not None:
                notes.append(self._note(output, prompt_lens))
        return EngineRun(begin_s, tuple(notes))

    def _add(self, request_id: int, prompt: Sequence[int], num_tokens: int, now: float) -> None:
        request = Request(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            choices=(ChoiceStart(0),),
            sampling=SamplingParams(seed=0, temperature=0.0),
            max_tokens=num_tokens,
        )
        if (rejection := self._scheduler.add(request, now)) is not None:
            raise RuntimeError(f"refused: {rejection.message}")

    def _note(self, output: StepOutput, prompt_lens: dict[int, int]) -> StepNote:
        if output.failed:
            raise RuntimeError(f"a request failed: {output.failed[0].message}")
        entries = output.tokens
        return StepNote(
            time.monotonic(),
            sum(len(entry.token_ids) for entry in entries),
            len(entries),
            min((entry.token_offset for entry in entries), default=0),
            sum(prompt_lens[entry.request_id] + entry.token_offset for entry in entries),
            getattr(self._scheduler.newest_times, "device_idle_s", None),
        )


@contextlib.contextmanager
def open_large(work_dir: Path, scale: Scale) -> Iterator[LoadedEngine]:
    """Load the large shape in bf16."""
    with _open(work_dir, scale, scale.large, "none") as engine:
        yield engine


@contextlib.contextmanager
def open_large_int8(work_dir: Path, scale: Scale) -> Iterator[LoadedEngine]:
    """Load the large shape in INT8."""
    with _open(work_dir, scale, scale.large, "int8") as engine:
        yield engine


@contextlib.contextmanager
def open_small(work_dir: Path, scale: Scale) -> Iterator[LoadedEngine]:
    """Load the small shape in bf16."""
    with _open(work_dir, scale, scale.small, "none") as engine:
        yield engine


@contextlib.contextmanager
def _open(work_dir: Path, scale: Scale, shape: Shape, quantization: str) -> Iterator[LoadedEngine]:
    settings = load_settings(overrides=scale.settings(quantization))
    ready = load_whole(settings, work_dir / shape.name, find_device())
    try:
        gc.freeze()  # as the replica does
        engine = LoadedEngine(ready, scale, shape, quantization)
        warm_up(engine, scale)
        with energy_log() as engine.energy:
            yield engine
    finally:
        ready.executor.close()


def warm_up(engine: LoadedEngine, scale: Scale) -> None:
    """Run the largest batch, shrinking, and one long prompt: what is made once is made here."""
    count, vocab_size = scale.batches[-1], engine.shape.vocab_size
    short = prompts("warm-up", count, _WARM_PROMPT_TOKENS, vocab_size)
    engine.run(short, staggered_lens(count))
    long = prompts("warm-up, long", 2, scale.prefill_tokens, vocab_size)
    engine.run(long, [2, 2])


def describe(engine: LoadedEngine, seconds: float) -> Row:
    """Say how long it took until the engine was warm."""
    return {
        "what": "load",
        "shape": engine.shape.name,
        "quantization": engine.quantization,
        "seconds": round(seconds, 2),
        "samples": [seconds],
    }
