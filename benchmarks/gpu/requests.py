"""Many requests at once through the engine alone: what transformers and the gRPC path stand beside.

The prompts are those of REQUESTS, by their number: the same in every contestant's process.
"""

from collections.abc import Iterator

from benchmarks.gpu.engine_alone import LoadedEngine
from benchmarks.gpu.prompts import prompts
from benchmarks.gpu.rows import Row
from benchmarks.gpu.scale import Scale

REQUESTS = "requests {}"
"""The prompts' seed, by how many there are at once."""


def measure(engine: LoadedEngine, scale: Scale) -> Iterator[Row]:
    """Run each of the larger batches' worth of requests."""
    for count in scale.batches[1:]:
        given = prompts(
            REQUESTS.format(count), count, scale.request_prompt_tokens, engine.shape.vocab_size
        )
        run = engine.run(given, [scale.request_output_tokens] * count)
        joules = engine.energy.joules(run.begin_s, run.begin_s + run.seconds)
        yield request_row("engine alone", scale, count, run.num_tokens, run.seconds) | {
            "joules_per_token": round(joules / run.num_tokens, 4) if joules else None
        }


def request_row(what: str, scale: Scale, count: int, num_tokens: int, seconds: float) -> Row:
    """Return what every contestant's row says. Raises RuntimeError where tokens are missing."""
    asked = count * scale.request_output_tokens
    if num_tokens != asked:
        raise RuntimeError(f"{what} gave {num_tokens} tokens; asked were {asked}")
    return {
        "what": what,
        "requests": count,
        "prompt_tokens": scale.request_prompt_tokens,
        "output_tokens": scale.request_output_tokens,
        "seconds": round(seconds, 4),
        "output_tokens_per_s": round(num_tokens / seconds, 1),
        "samples": [seconds],
    }
