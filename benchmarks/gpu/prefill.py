"""Prefill: long prompts at once, from their arrival to the last one's first token."""

import statistics
from collections.abc import Iterator

from benchmarks.gpu.engine_alone import LoadedEngine
from benchmarks.gpu.prompts import prompts
from benchmarks.gpu.rows import Row
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.work import prefill_work

_NUM_TRIES = 3


def measure(engine: LoadedEngine, scale: Scale) -> Iterator[Row]:
    """Measure several times, each with prompts of its own."""
    count, length = scale.prefill_prompts, scale.prefill_tokens
    seconds = []
    for number in range(_NUM_TRIES):
        given = prompts(f"prefill {number}", count, length, engine.shape.vocab_size)
        seconds.append(engine.run(given, [1] * count).seconds)
    work, median_s = prefill_work(engine.shape, count, length), statistics.median(seconds)
    yield {
        "what": "prefill",
        "shape": engine.shape.name,
        "prompts": count,
        "prompt_tokens": length,
        "seconds": round(median_s, 5),
        "tokens_per_s": round(count * length / median_s, 1),
        "operations": work.operations,
        "read_bytes": work.read_bytes,
        "samples": seconds,
    }
