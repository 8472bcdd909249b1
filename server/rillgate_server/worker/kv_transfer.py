"""Copies of whole blocks between the tiers, beside the steps.

Owns the copies in flight: their order, their thread, their audit and their reports. Does not know
why a block is copied, nor when a block may be used again (whoever sent the job does, once it hears
of its end).

    step's thread ── begin ──▶ SimpleQueue ──▶ copying thread: copy, checksum, one job at a time
          ◀── take_finished ── SimpleQueue ◀──┘

A thread on CPUs and GPUs alike: there it copies, here it waits for the GPU that copies.
"""

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from time import perf_counter
from typing import Protocol

from rillgate_server.core.step import CopyDirection, CopyDone, CopyJob
from rillgate_server.worker.kv_storage import KVStorage

_log = logging.getLogger(__name__)

Pairs = Sequence[tuple[int, int]]
"""(source block, target block)."""

COPY_WAIT_S = 0.005
"""A plan without rows waits for a copy no longer than this: commands come in between plans."""
_THREAD_NAME = "rillgate-copies"


class BlockCopier(Protocol):
    """Moves the bytes. Called from the copying thread, but for `work_so_far`."""

    device: KVStorage
    host: KVStorage

    def work_so_far(self) -> Callable[[], None]:
        """Return a function that waits for what the calling thread has given the device to do."""
        ...

    def copy(self, direction: CopyDirection, pairs: Pairs) -> None:
        """Copy blocks; the bytes have arrived when it returns. May raise: then none counts."""
        ...

    def device_checksum(self, block: int) -> int:
        """Return the CRC-32 of a block of the device tier."""
        ...


class KVTransfer:
    """Copies in flight. All methods are called from the step's thread, and none of them raises.

    State: the jobs that wait for the thread, the reports that wait to be taken, their number, and
    the thread (from the first job on, until `close`).
    """

    def __init__(self, copier: BlockCopier, *, audit: bool = False) -> None:
        """Copy with `copier`; `audit`: give checksums of blocks that leave the device tier."""
        self._copier = copier
        self._audit = audit
        self._jobs: SimpleQueue[tuple[CopyJob, Callable[[], None]] | None] = SimpleQueue()
        self._reports: SimpleQueue[CopyDone] = SimpleQueue()
        self._ended: list[CopyDone] = []
        """Reports taken out of the queue, not yet given away."""
        self._num_in_flight = 0
        self._thread: Thread | None = None

    def __repr__(self) -> str:
        """Show what is in flight."""
        return f"KVTransfer(num_in_flight={self._num_in_flight}, audit={self._audit})"

    def begin(self, job: CopyJob) -> None:
        """Copy a job's blocks, behind the jobs before it; what cannot be begun is reported."""
        self._num_in_flight += 1
        problem = self._problem_with(job)
        if problem:
            self._reports.put(_all_failed(job, problem))
            return
        try:
            if self._thread is None:
                # A daemon, so that a process that dies of something else does not wait for it.
                thread = Thread(target=self._run, name=_THREAD_NAME, daemon=True)
                thread.start()
                self._thread = thread
            self._jobs.put((job, self._copier.work_so_far()))
        except Exception as error:  # a broken GPU: the step that follows says more; or no thread
            self._reports.put(_all_failed(job, f"{type(error).__name__}: {error}"))

    def take_finished(self) -> tuple[CopyDone, ...]:
        """Return the reports of all copies that ended since the last call."""
        while True:
            try:
                self._ended.append(self._reports.get_nowait())
            except Empty:
                break
        finished, self._ended = tuple(self._ended), []
        self._num_in_flight -= len(finished)
        return finished

    def wait_any(self, timeout_s: float) -> None:
        """Wait for the first end of a copy; at once when one has ended or none is in flight."""
        if self._ended or not self._num_in_flight:
            return
        try:
            self._ended.append(self._reports.get(timeout=timeout_s))
        except Empty:
            return

    def close(self) -> None:
        """End the thread, after the job that it is at; jobs behind that one are dropped."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        try:
            while True:
                self._jobs.get_nowait()
        except Empty:
            self._jobs.put(None)
        thread.join()

    def _problem_with(self, job: CopyJob) -> str:
        """Say what is wrong with a job: a wrong plan must not touch others' memory."""
        device, host = self._copier.device.num_blocks, self._copier.host.num_blocks
        is_load = job.direction is CopyDirection.HOST_TO_DEVICE
        num_sources, num_targets = (host, device) if is_load else (device, host)
        for source, target in job.pairs:
            if not (0 <= source < num_sources and 0 <= target < num_targets):
                return (
                    f"block {source} was to be copied to {target}; there are {num_sources} and "
                    f"{num_targets}"
                )
        num_checksums = len(job.pairs) if job.checksums is None else len(job.checksums)
        if num_checksums != len(job.pairs) or (job.checksums is not None and not is_load):
            return f"{num_checksums} checksums came for {len(job.pairs)} blocks, {job.direction}"
        return ""

    # -- the copying thread -----------------------------------------------------------------------

    def _run(self) -> None:
        while (begun := self._jobs.get()) is not None:
            job, wait_for_work = begun
            try:
                wait_for_work()
                report = self._execute(job)
            except Exception as error:  # the border of this thread: the job fails, the next follows
                _log.exception("copy %d failed", job.copy_id)
                report = _all_failed(job, f"{type(error).__name__}: {error}")
            self._reports.put(report)

    def _execute(self, job: CopyJob) -> CopyDone:
        begin = perf_counter()
        self._copier.copy(job.direction, job.pairs)
        is_load = job.direction is CopyDirection.HOST_TO_DEVICE
        failed: tuple[int, ...] = ()
        checksums: tuple[int, ...] = ()
        if job.checksums is not None:
            arrived = self._checksums(target for _, target in job.pairs)
            expected = zip(arrived, job.checksums, strict=True)
            failed = tuple(i for i, (found, wanted) in enumerate(expected) if found != wanted)
        elif self._audit and not is_load:
            checksums = self._checksums(source for source, _ in job.pairs)
        return CopyDone(
            job.copy_id,
            failed,
            (len(job.pairs) - len(failed)) * self._copier.device.layout.block_bytes,
            perf_counter() - begin,
            checksums,
            f"{len(failed)} blocks came back with another checksum" if failed else "",
            num_refused=len(failed),
        )

    def _checksums(self, device_blocks: Iterable[int]) -> tuple[int, ...]:
        return tuple(map(self._copier.device_checksum, device_blocks))


class MemoryCopier:
    """Copies between two tiers in this process's memory.

    With numpy, which lets go of the interpreter's lock while it copies and never forks: a torch
    operation in a second thread would start an OpenMP team of its own, and two teams on the same
    cores let each other sleep at every barrier (33 instead of 20 ms per decode step on two cores).
    """

    def __init__(self, device: KVStorage, host: KVStorage) -> None:
        """Copy between these two."""
        self.device = device
        self.host = host
        self._device_bytes = device.bytes.numpy()
        self._host_bytes = host.bytes.numpy()

    def work_so_far(self) -> Callable[[], None]:
        """Return a function that does nothing: a CPU's work is done when its call returns."""
        return _nothing

    def copy(self, direction: CopyDirection, pairs: Pairs) -> None:
        """Copy blocks."""
        sources, targets = self._device_bytes, self._host_bytes
        if direction is CopyDirection.HOST_TO_DEVICE:
            sources, targets = targets, sources
        for source, target, length in adjacent_runs(pairs):
            targets[target : target + length] = sources[source : source + length]

    def device_checksum(self, block: int) -> int:
        """Return the CRC-32 of a block of the device tier."""
        return zlib.crc32(self._device_bytes[block].data)


def adjacent_runs(pairs: Pairs) -> Iterator[tuple[int, int, int]]:
    """Give (first source, first target, blocks) of runs that are adjacent on both sides."""
    first_source, first_target, length = -1, -1, 0
    for source, target in pairs:
        if length and source == first_source + length and target == first_target + length:
            length += 1
            continue
        if length:
            yield first_source, first_target, length
        first_source, first_target, length = source, target, 1
    if length:
        yield first_source, first_target, length


def _nothing() -> None:
    pass


def _all_failed(job: CopyJob, message: str) -> CopyDone:
    return CopyDone(job.copy_id, tuple(range(len(job.pairs))), message=message)
