"""Copies between a GPU's memory and the host's, on a stream beside the computation's.

Owns that stream. Needs CUDA; what can be tested without it is in worker.kv_transfer, and
`make gpu-check` holds this to the same.
"""

import zlib
from collections.abc import Callable

import torch

from rillgate_server.core.step import CopyDirection
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.kv_transfer import Pairs, adjacent_runs


class StreamCopier:
    """A BlockCopier whose device tier is on a GPU; the host tier should be pinned.

    State: the stream, and one pinned block for checksums.
    """

    def __init__(self, device: KVStorage, host: KVStorage) -> None:
        """Copy between these two."""
        self.device = device
        self.host = host
        self._stream = torch.cuda.Stream(device.bytes.device)
        self._audited = torch.empty(device.layout.block_bytes, dtype=torch.uint8, pin_memory=True)

    def work_so_far(self) -> Callable[[], None]:
        """Return a function that waits for the computation's work so far, without the CPU."""
        computed = torch.cuda.Event(blocking=True)
        computed.record(torch.cuda.current_stream(self.device.bytes.device))
        return computed.synchronize

    def copy(self, direction: CopyDirection, pairs: Pairs) -> None:
        """Copy blocks; raises RuntimeError when the GPU refuses."""
        sources, targets = self.device.bytes, self.host.bytes
        if direction is CopyDirection.HOST_TO_DEVICE:
            sources, targets = targets, sources
        try:
            with torch.cuda.stream(self._stream):
                for source, target, length in adjacent_runs(pairs):
                    targets[target : target + length].copy_(
                        sources[source : source + length], non_blocking=True
                    )
        finally:
            self._wait()  # whatever was begun: the blocks of a failed copy are used again

    def device_checksum(self, block: int) -> int:
        """Return the CRC-32 of a block on the GPU, over another copy of it."""
        with torch.cuda.stream(self._stream):
            self._audited.copy_(self.device.bytes[block], non_blocking=True)
        self._wait()
        return zlib.crc32(self._audited.numpy().data)

    def _wait(self) -> None:
        """Wait for the stream, asleep: a thread that spins takes the step's time."""
        done = torch.cuda.Event(blocking=True)
        done.record(self._stream)
        done.synchronize()
