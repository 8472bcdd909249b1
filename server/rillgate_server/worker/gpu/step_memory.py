"""How much of a GPU's memory the largest step takes, and the captured ones: measured, once.

Owns the measuring: such a step is computed over a small cache, before the real one takes what is
left. Does not know what the cache gets.
"""

import logging
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor

from rillgate_server.core.model_spec import ModelSpec
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import SlotStart, StepLimits
from rillgate_server.errors import OutOfMemory
from rillgate_server.worker.attention.base import AttentionBackend
from rillgate_server.worker.attention.static_decode import StaticDecode
from rillgate_server.worker.attention.triton_paged import TritonPagedAttention
from rillgate_server.worker.compute_device import free_bytes
from rillgate_server.worker.gpu.cuda_graphs import CudaCapture, DecodeGraphs, graph_sizes
from rillgate_server.worker.gpu.device_sampler import DeviceSampler, Draw
from rillgate_server.worker.gpu.step_arrays import Run, StepArrays
from rillgate_server.worker.network.base import Network

_log = logging.getLogger(__name__)

_FILTERED = SamplingParams(
    seed=0, temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.1, num_logprobs=20
)
"""What takes most memory to draw with."""


@torch.inference_mode()
def measure_step_bytes(
    network: Network,
    attention_over: Callable[[int], AttentionBackend],
    block_size_tokens: int,
    spec: ModelSpec,
    limits: StepLimits,
) -> int:
    """Return what a step within `limits` takes beside weights and cache, graphs included.

    `attention_over`: makes it over a cache of so many blocks.
    """
    num_blocks = -(-limits.max_step_tokens // block_size_tokens) + 1
    attention = cast(TritonPagedAttention, attention_over(num_blocks))
    device = attention.device
    compute_parted_step(network, attention, limits)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        compute_largest_step(network, attention, spec, limits)
    except torch.OutOfMemoryError as error:
        what = f"a step of batcher.max_step_tokens, {limits.max_step_tokens}"
        asked = torch.cuda.max_memory_allocated(device) - before
        raise OutOfMemory(what, asked, free_bytes(device)) from error
    torch.cuda.synchronize(device)
    step_bytes = torch.cuda.max_memory_allocated(device) - before
    graph_bytes = 0
    if limits.uses_graphs and network.is_capturable:
        try:
            graph_bytes = _measure_graphs(network, attention, limits)
        except RuntimeError as error:  # as in assembly.capture_decode, which will say more
            _log.warning("captured decode steps could not be measured: %s", error)
    _log.info(
        "the largest step takes %.0f MiB beside weights and cache, captured steps %.0f MiB",
        step_bytes / 2**20,
        graph_bytes / 2**20,
    )
    return step_bytes + graph_bytes


def compute_parted_step(
    network: Network, attention: TritonPagedAttention, limits: StepLimits
) -> None:
    """Compute a decode row and a short chunk behind the longest context, which are cut into parts:
    what only such steps need is compiled now and not while somebody waits."""
    size = attention.storage.layout.block_size_tokens
    num_tokens = limits.max_context_tokens
    table = np.zeros(-(-num_tokens // size), dtype=np.int64)
    chunk = min(18, num_tokens)
    runs = [
        Run(0, num_tokens - 1, [0], table),
        Run(0, num_tokens - chunk, [0] * chunk, table),
    ]
    _hidden(network, attention, StepArrays.of(runs, size))


def compute_largest_step(
    network: Network, attention: TritonPagedAttention, spec: ModelSpec, limits: StepLimits
) -> None:
    """Compute chunks of as many tokens as a step may have, and draw for all rows."""
    size, device = attention.storage.layout.block_size_tokens, attention.device
    sampler = DeviceSampler(spec.vocab_size, device, limits.max_running)
    num_drawn = min(limits.max_running, limits.max_step_tokens)
    for slot in range(num_drawn):
        sampler.start(SlotStart(slot, (0,), 1, (), _FILTERED, 0))
    table = np.arange(attention.storage.num_blocks)
    runs, left, at = [], limits.max_step_tokens, 0
    while left:
        num_tokens = min(left, limits.max_context_tokens)
        runs.append(Run(0, 0, [0] * num_tokens, table[at:]))
        left, at = left - num_tokens, at + num_tokens // size
    hidden = _hidden(network, attention, StepArrays.of(runs, size))
    logits = network.logits(hidden[:num_drawn])
    if logits is not None:
        sampler.sample(logits, [Draw(slot, 0) for slot in range(num_drawn)])


def _hidden(network: Network, attention: TritonPagedAttention, arrays: StepArrays) -> Tensor:
    fields = arrays.fields_on(attention.device)
    of = arrays.offset, arrays.start, arrays.num_tokens
    step = attention.prepare_runs(of, arrays.tables, (fields[2], fields[3]))
    return network.hidden(fields[0], fields[1], step)


def _measure_graphs(network: Network, attention: TritonPagedAttention, limits: StepLimits) -> int:
    """Capture the largest size, then the next: the first has the memory that all share, each
    further one takes what the second did. The driver's own memory is in it; what the arrays of a
    larger cache take beyond the small one's is left to the part that the cache does not take."""
    sizes = sorted(graph_sizes(limits.max_running), reverse=True)
    capture = CudaCapture(attention.device)
    free = [_free_bytes(attention.device)]
    static = StaticDecode(attention, sizes[0], limits.max_context_tokens)
    kept = []
    for number in sizes[:2]:
        kept.append(DecodeGraphs(network, static, (number,), capture))
        free.append(_free_bytes(attention.device))
    first, further = free[0] - free[1], 0 if len(free) < 3 else max(0, free[1] - free[2])
    return first + further * (len(sizes) - 1)


def _free_bytes(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    num_bytes, _ = torch.cuda.mem_get_info(device)
    return int(num_bytes)
