"""What carries out plans on a GPU, put together.

Imported only where there is a GPU, or Triton's interpreter (tests).
"""

import logging
from functools import partial

import numpy as np
import torch

from rillgate_server.core.step import StepLimits
from rillgate_server.worker.attention.static_decode import StaticDecode
from rillgate_server.worker.attention.triton_paged import TritonPagedAttention
from rillgate_server.worker.draft_model import DraftModel
from rillgate_server.worker.gpu.cuda_graphs import CudaCapture, DecodeGraphs, Launch, graph_sizes
from rillgate_server.worker.gpu.device_runner import DeviceRunner
from rillgate_server.worker.gpu.device_sampler import DeviceSampler
from rillgate_server.worker.gpu.step_arrays import Run, StepArrays
from rillgate_server.worker.kv_transfer import KVTransfer
from rillgate_server.worker.network.base import Network

_log = logging.getLogger(__name__)


def make_device_runner(
    network: Network,
    attention: TritonPagedAttention,
    transfer: KVTransfer,
    vocab_size: int,
    limits: StepLimits | None,
    draft_model: DraftModel | None,
) -> DeviceRunner:
    """Make the runner, with all of its room; captures graphs within `limits`, None: none."""
    device = attention.device
    sampler = DeviceSampler(vocab_size, device, *([limits.max_running] if limits else []))
    graphs = None
    if limits is not None and device.type == "cuda":
        sampler.warm_up(attention.dtype)
    if limits is not None and limits.uses_graphs and network.is_capturable:
        graphs = capture_decode(network, attention, limits)
    return DeviceRunner(network, attention, transfer, sampler, graphs, draft_model)


@torch.inference_mode()
def capture_decode(
    network: Network, attention: TritonPagedAttention, limits: StepLimits
) -> DecodeGraphs | None:
    """Capture decode steps; None where that fails: they are launched layer by layer then."""
    sizes = graph_sizes(limits.max_running)
    capture = CudaCapture(attention.device) if attention.device.type == "cuda" else _repeat
    try:
        static = StaticDecode(attention, sizes[-1], limits.max_context_tokens)
        return DecodeGraphs(network, static, sizes, capture)
    except RuntimeError as error:  # OutOfMemoryError is one
        _log.warning("decode steps could not be captured in CUDA graphs: %s", error)
        return None


@torch.inference_mode()
def capture_one_step(
    network: Network, attention: TritonPagedAttention, num_rows: int, context_tokens: int
) -> Launch | None:
    """Capture a decode step of rows at the end of contexts of their own; what is returned computes
    it again, to be timed. None where steps of this network are not captured."""
    if not network.is_capturable:
        return None
    limits = StepLimits(num_rows, num_rows, context_tokens)
    graphs = capture_decode(network, attention, limits)
    if graphs is None:
        return None
    size = attention.storage.layout.block_size_tokens
    tables = np.arange(num_rows * -(-context_tokens // size)).reshape(num_rows, -1)
    runs = [Run(row, context_tokens - 1, [0], table) for row, table in enumerate(tables)]
    last_tokens = torch.zeros(num_rows, dtype=torch.int64, device=attention.device)
    assert graphs.run(StepArrays.of(runs, size), last_tokens) is not None
    return partial(graphs.again, num_rows)


def _repeat(launch: Launch) -> Launch:
    """Capture nothing: on a CPU the same is launched again."""
    return launch
