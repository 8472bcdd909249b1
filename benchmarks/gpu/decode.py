"""Decode: the time of a step in which all rows decode, at the ends of their contexts.

Time lies between the outputs of such steps, so it is whatever the engine keeps a caller waiting
for, Python included; median of the differences.
"""

import statistics
from collections.abc import Iterator
from itertools import pairwise

from benchmarks.gpu.engine_alone import EngineRun, LoadedEngine
from benchmarks.gpu.prompts import prompts
from benchmarks.gpu.rows import Row
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.work import decode_work


def measure(engine: LoadedEngine, scale: Scale) -> Iterator[Row]:
    """Measure each batch."""
    for batch, num_steps in zip(scale.batches, scale.decode_tokens, strict=True):
        given = prompts(f"decode {batch}", batch, scale.context_tokens, engine.shape.vocab_size)
        # While the last prompts are computed the first answers grow: they must last to the end.
        chunks = -(-batch * scale.context_tokens // scale.max_prefill_chunk_tokens)
        num_tokens = num_steps + chunks + 2 if batch > 1 else num_steps
        run = engine.run(given, [num_tokens] * batch)
        yield decode_row(engine, batch, run)


def decode_row(engine: LoadedEngine, batch: int, run: EngineRun) -> Row:
    """Read a row from a run of one batch; raises RuntimeError where it never decodes as a whole."""
    notes = run.steady(batch)
    if len(notes) < 2:
        raise RuntimeError(f"{len(notes)} steps in which all {batch} rows decode")
    steps_s = [after.end_s - before.end_s for before, after in pairwise(notes)]
    step_s = statistics.median(steps_s)
    context_tokens = statistics.mean(note.context_tokens for note in notes[1:])
    work = decode_work(engine.shape, batch, context_tokens, engine.quantization)
    begin_s, end_s = notes[0].end_s, notes[-1].end_s
    joules = engine.energy.joules(begin_s, end_s)
    idle = [note.idle_s for note in notes[1:] if note.idle_s is not None]
    return {
        "what": "decode",
        "shape": engine.shape.name,
        "quantization": engine.quantization,
        "batch": batch,
        "context_tokens": round(context_tokens / batch, 1),
        "step_ms": round(step_s * 1e3, 4),
        "tokens_per_s": round(batch / step_s, 1),
        "read_bytes": work.read_bytes,
        "operations": work.operations,
        "device_idle_share": round(sum(idle) / (end_s - begin_s), 4) if idle else None,
        "joules_per_token": round(joules / (batch * len(steps_s)), 4) if joules else None,
        "samples": [round(step * 1e3, 4) for step in steps_s],
    }
