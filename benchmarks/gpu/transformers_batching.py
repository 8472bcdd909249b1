"""transformers' continuous batching on the same checkpoint, prompts and device.

Everything is left to its defaults (kind of attention, size of its cache and of its batches, CUDA
graphs), which it chooses for the device; only sharing of prompts' beginnings is off, as no two
begin alike. Where its choice of attention cannot be had (flash attention comes from the hub),
`sdpa`. It warms up before the clock runs. A row says when a run begins, so that one which is ended
for taking too long still gives a bound.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from benchmarks.gpu.prompts import prompts
from benchmarks.gpu.requests import REQUESTS, request_row
from benchmarks.gpu.rows import BEGAN, Row
from benchmarks.gpu.scale import Scale
from rillgate_server.worker.compute_device import find_device

_WARM_TOKENS = 4
_CPU_BLOCKS = 256
"""Of the cache on a CPU, which it would otherwise size for all of the memory."""


@dataclass(frozen=True, slots=True)
class LoadedNetwork:
    """transformers' network, on the device."""

    network: Any  # transformers' classes are not typed
    vocab_size: int
    attention: str


@contextlib.contextmanager
def open_network(work_dir: Path, scale: Scale) -> Iterator[LoadedNetwork]:
    """Load the large shape; take sdpa where the attention of its choice does not run."""
    device = find_device()
    # With accelerate the weights go straight to the device.
    straight = {"device_map": device} if find_spec("accelerate") else {}
    network = AutoModelForCausalLM.from_pretrained(
        work_dir / scale.large.name, dtype=torch.bfloat16, **straight
    )
    if not straight:
        network.to(device)
    loaded = LoadedNetwork(network, scale.large.vocab_size, "its choice")
    warm = prompts("warm-up", 2, scale.request_prompt_tokens, scale.large.vocab_size)
    runs = True
    try:
        generate(loaded, warm, _WARM_TOKENS)
    except Exception as error:  # whatever it is, sdpa may do
        print(f"attention of its choice: {error!r}", flush=True)
        runs = False
    if not runs:  # past the handler: what the failed attempt held is free by now
        loaded = LoadedNetwork(network, scale.large.vocab_size, "paged|sdpa")
        network.set_attn_implementation(loaded.attention)
        generate(loaded, warm, _WARM_TOKENS)
    yield loaded


def describe(loaded: LoadedNetwork, seconds: float) -> Row:
    """Say how long it took until it had generated."""
    return {"what": "load", "seconds": round(seconds, 2), "samples": [seconds]}


def measure(loaded: LoadedNetwork, scale: Scale) -> Iterator[Row]:
    """Run the same requests as the engine alone."""
    for count in scale.batches[1:]:
        given = prompts(
            REQUESTS.format(count), count, scale.request_prompt_tokens, loaded.vocab_size
        )
        began_s = time.monotonic()
        yield {
            "what": BEGAN,
            "requests": count,
            "began_s": began_s,
            "samples": [began_s],
        }
        num_tokens, seconds = generate(loaded, given, scale.request_output_tokens)
        row = request_row("transformers, continuous batching", scale, count, num_tokens, seconds)
        yield row | {"attention": loaded.attention}


def generate(
    loaded: LoadedNetwork, given: Sequence[Sequence[int]], num_tokens: int
) -> tuple[int, float]:
    """Return how many tokens came, and the seconds from the first request to the last token."""
    config = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=1
    )
    manager_options = {
        "generation_config": config,
        "continuous_batching_config": _batching_config(),
        "workload_hints": WorkloadHints(len(given[0]), num_tokens, len(given)),  # as generate_batch
    }
    with loaded.network.continuous_batching_context_manager(**manager_options) as manager:
        begin_s = time.monotonic()
        manager.add_requests(inputs=[list(prompt) for prompt in given], max_new_tokens=num_tokens)
        results: dict[str, int] = {}
        while len(results) < len(given):
            result = manager.get_result(timeout=1)
            if result is not None and result.error:
                raise RuntimeError(result.error)
            if result is not None and result.is_finished():
                results[result.request_id] = len(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("its thread ended before the requests did")
        return sum(results.values()), time.monotonic() - begin_s


def _batching_config() -> ContinuousBatchingConfig:
    chosen: dict[str, Any] = {"allow_block_sharing": False}
    if find_device().type != "cuda":
        chosen |= {"num_blocks": _CPU_BLOCKS, "max_batch_tokens": 256}
        names = {field.name for field in fields(ContinuousBatchingConfig)}
        # 5.17 calls block_size what 5.23 calls page_size.
        name = "page_size" if "page_size" in names else "block_size"
        chosen[name] = 32
    return ContinuousBatchingConfig(**chosen)
