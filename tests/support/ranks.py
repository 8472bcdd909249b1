"""Ranks of a split model in processes of their own, with rank 0 in the test's.

Importing torch and transformers takes seconds, so the processes stay, and each join starts another
group in them. `python -m tests.support.ranks` is what such a process runs.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import torch

from rillgate_server.core.step import CopyDirection
from rillgate_server.errors import RankLost
from rillgate_server.worker import worker as worker_module
from rillgate_server.worker.host_memory import available_bytes
from rillgate_server.worker.kv_tiers import reserve_tiers
from rillgate_server.worker.kv_transfer import BlockCopier, Pairs
from rillgate_server.worker.rank_executor import RankExecutor
from rillgate_server.worker.rank_group import RankGroup
from rillgate_server.worker.rank_loop import run_rank
from rillgate_server.worker.rendezvous import RankPlace
from rillgate_server.worker.worker import DEVICE, Worker, WorkerOptions
from tests.support.worker_fixtures import BLOCK_SIZE

WAIT_S = 60.0
"""Far more than anything here takes; reached only when a test fails."""


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class RankProcess:
    """A process that becomes a rank, again and again."""

    def __init__(self) -> None:
        """Start it; it imports what it needs meanwhile."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
        )

    def become(self, **order: object) -> None:
        """Make it join a group."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        """Wait for its word on the last group: `ended`, or why it could not."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        """Kill it, if it still runs."""
        self.process.kill()
        self.process.communicate()


@dataclass
class RankPool:
    """The processes, as many as the largest group so far needed."""

    processes: list[RankProcess] = field(default_factory=list)

    def take(self, num: int) -> list[RankProcess]:
        """Return so many that live."""
        self.processes = [it for it in self.processes if it.process.poll() is None]
        while len(self.processes) < num:
            self.processes.append(RankProcess())
        return self.processes[:num]

    def close(self) -> None:
        """End all of them."""
        for process in self.processes:
            process.end()


@dataclass
class Split:
    """A split model with its ranks."""

    executor: RankExecutor
    worker: Worker
    group: RankGroup
    ranks: list[RankProcess]
    lost: "Future[RankLost]"
    """Done when the watch has noticed a loss."""

    def execute_in_thread(self, plan: object) -> "Future[object]":
        """Execute a plan that may hang for ever."""
        result: Future[object] = Future()

        def run() -> None:
            try:
                result.set_result(self.executor.execute(plan))  # type: ignore[arg-type]
            except Exception as error:  # for the test to look at
                result.set_exception(error)

        Thread(target=run, daemon=True).start()
        return result


def join(pool: RankPool, path: Path, ranks: int, **order: object) -> Split:
    """Load a checkpoint over `ranks` processes, this one rank 0; `order` changes what others do."""
    port = free_port()
    others = pool.take(ranks - 1)
    for i, process in enumerate(others):
        process.become(path=str(path), rank=i + 1, ranks=ranks, port=port, **order)
    group = RankGroup.join(RankPlace(0, ranks, "127.0.0.1", port), {}, DEVICE, WAIT_S)
    lost: Future[RankLost] = Future()
    group.call_on_loss(lost.set_result)
    worker = Worker.load(path, _options(), group=group)
    return Split(RankExecutor(worker, group), worker, group, others, lost)


@contextmanager
def split_model(
    pool: RankPool, path: Path, ranks: int, num_host_blocks: int = 0, **order: object
) -> Iterator[Split]:
    """Give a split model with a small cache, and end it in good order."""
    split = join(pool, path, ranks, **order)
    split.executor.least_spare_bytes(available_bytes)
    split.executor.allocate_cache(60, num_host_blocks, bool(num_host_blocks))
    try:
        yield split
    finally:
        if split.lost.done():
            split.worker.close()
        else:
            split.executor.close()
            assert [process.answer() for process in split.ranks] == ["ended"] * (ranks - 1)


def _options() -> WorkerOptions:
    return WorkerOptions(dtype="float32", num_threads=1, block_size_tokens=BLOCK_SIZE)


class SpoiltCopier:
    """A copier that never ends copies, or fails them."""

    def __init__(self, copier: BlockCopier, fault: str) -> None:
        self._copier = copier
        self._fault = fault
        self.device, self.host = copier.device, copier.host
        self.work_so_far = copier.work_so_far
        self.device_checksum = copier.device_checksum

    def copy(self, direction: CopyDirection, pairs: Pairs) -> None:
        """Copy, in a way."""
        if self._fault == "endless":
            Future[None]().result()
        if self._fault == "broken":
            raise RuntimeError("the bus is broken")
        self._copier.copy(direction, [(s, t) for s, t in pairs if s != 0])


def main() -> None:
    """Become ranks, as stdin says."""
    for line in sys.stdin:
        order = json.loads(line)
        place = RankPlace(order["rank"], order["ranks"], "127.0.0.1", order["port"])
        group = RankGroup.join(place, {}, DEVICE, WAIT_S)
        fault = order.get("copies")

        def reserve(*arguments: object, fault: str | None = fault) -> BlockCopier:
            copier = reserve_tiers(*arguments)  # type: ignore[arg-type]
            return copier if fault is None else SpoiltCopier(copier, fault)

        worker_module.reserve_tiers = reserve  # type: ignore[attr-defined, assignment]
        worker = Worker.load(Path(order["path"]), _options(), group=group)
        run_rank(worker, group, available_bytes, lambda: None)
        print("ended", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
