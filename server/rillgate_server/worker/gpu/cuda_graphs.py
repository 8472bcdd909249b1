"""Decode steps captured once and replayed: no Python and no launch per layer.

Owns the captured sizes and what they read: a step of n rows runs in the smallest size that holds
it, its last rows being padding. Does not know what is captured (a Network over a StaticDecode), nor
sampling, which follows outside.

What a captured launch reads lies at fixed places: the fields of the step's tokens, the attention's
arrays, weights and the cache. The output lies at a fixed place, too, until the next replay of the
same size. All sizes share one memory pool: they never run at the same time.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from rillgate_server.worker.attention.static_decode import StaticDecode
from rillgate_server.worker.gpu.step_arrays import NO_BLOCK, NUM_FIELDS, StepArrays, fill_unknown
from rillgate_server.worker.network.base import Network

MAX_GRAPH_ROWS = 512
"""Above it a step computes for longer than its launches take."""

Launch = Callable[[], Tensor]
"""Launches a step of one size; returns the hidden states [rows, hidden_size]."""
Capture = Callable[[Launch], Launch]
"""Makes something that launches the same again."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Size:
    """One captured size."""

    fields: Tensor
    """[5, rows], as in StepArrays."""
    replay: Launch


class DecodeGraphs:
    """The captured sizes. State: what they read and write."""

    def __init__(
        self, network: Network, static: StaticDecode, sizes: tuple[int, ...], capture: Capture
    ) -> None:
        """Capture every size, the largest first: the smaller ones then fit its memory."""
        self._static = static
        self._sizes: dict[int, _Size] = {}  # rows -> captured
        began_s = time.monotonic()
        for done, num_rows in enumerate(sorted(sizes, reverse=True)):
            self._sizes[num_rows] = self._captured(network, num_rows, capture)
            if done % 10 == 0:
                _log.info(
                    "captured the decode step of %d rows (%d of %d)", num_rows, done + 1, len(sizes)
                )
        took_s = time.monotonic() - began_s
        _log.info("captured %d sizes of decode steps in %.1f s", len(sizes), took_s)

    def __repr__(self) -> str:
        """Show the sizes."""
        return f"DecodeGraphs({sorted(self._sizes)}, {self._static})"

    def run(self, arrays: StepArrays, last_tokens: Tensor) -> Tensor | None:
        """Compute decode rows; None: they fit no captured size.

        last_tokens: what each slot has drawn last, [num_slots]. Returns [num_rows, hidden_size], to
        be used before the next call.
        """
        num_rows = arrays.size
        size = min((size for size in self._sizes if size >= num_rows), default=0)
        if not arrays.is_decode or not size:
            return None
        if not self._static.fill(size, arrays.start, arrays.tables):
            return None
        of = self._sizes[size]
        of.fields.copy_(arrays.fields_on(of.fields.device, size))
        fill_unknown(of.fields, last_tokens)
        return of.replay()[:num_rows]

    def again(self, num_rows: int) -> Tensor:
        """Compute the step of a captured size that ran last, once more."""
        return self._sizes[num_rows].replay()

    def _captured(self, network: Network, num_rows: int, capture: Capture) -> _Size:
        device = self._static.device
        fields = torch.zeros(NUM_FIELDS, num_rows, dtype=torch.int64, device=device)
        fields[2] = NO_BLOCK
        step = self._static.step(num_rows, (fields[2], fields[3]))
        self._static.fill_empty(num_rows)

        def launch() -> Tensor:
            return network.hidden(fields[0], fields[1], step)

        return _Size(fields, capture(launch))


def graph_sizes(max_rows: int) -> tuple[int, ...]:
    """Return the sizes to capture: a step computes for at most an eighth of padding or so."""
    sizes = {1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, MAX_GRAPH_ROWS + 1, 32)}
    most = min(max_rows, MAX_GRAPH_ROWS)
    return tuple(sorted({size for size in sizes if size < most} | {most}))


class CudaCapture:
    """Captures launches in CUDA graphs (Capture). State: the pool that they share."""

    def __init__(self, device: torch.device) -> None:
        """Capture on a device."""
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, launch: Launch) -> Launch:
        """Launch once outside, so that kernels are compiled and workspaces there, then capture."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            launch()
            self._stream.synchronize()
            # Not torch.cuda.graph, which in some releases walks all of Python's objects each time.
            # Other threads may use the device meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = launch()
            except BaseException:
                with suppress(RuntimeError):  # of a capture that is void: the first fault counts
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay
