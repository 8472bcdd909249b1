"""Ranks of a split model in processes of their own, with rank 0 in the test's.

Importing torch and transformers takes seconds, so one process does it, and forks each rank.
`python -m tests.support.ranks` is what that process runs.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from rillgate_server.core.step import CopyDirection, StepLimits, StepPlan, StepResult
from rillgate_server.errors import RankLost
from rillgate_server.worker import collectives, rank_group
from rillgate_server.worker.collectives import Collectives
from rillgate_server.worker.compute_device import CPU, find_device, free_memory
from rillgate_server.worker.kv_transfer import BlockCopier, Pairs
from rillgate_server.worker.model_runner import ModelRunner
from rillgate_server.worker.rank_executor import RankExecutor
from rillgate_server.worker.rank_group import RankGroup
from rillgate_server.worker.rank_loop import run_rank
from rillgate_server.worker.rendezvous import RankPlace
from rillgate_server.worker.worker import Worker, WorkerOptions
from tests.support.worker_fixtures import BLOCK_SIZE

find_free_memory = partial(free_memory, CPU, 0, 1)
WAIT_S = 60.0
"""Far more than anything here takes; reached only when a test fails."""


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class RankProcess:
    """A process that is one rank of one group."""

    def __init__(self, pool: "RankPool", pid: int) -> None:
        """Use `RankPool.start`."""
        self._pool = pool
        self.pid = pid

    def send(self, number: int) -> None:
        """Send it a signal; it may have ended."""
        os.kill(self.pid, number)  # a zombie until it is waited for, so never somebody else

    def wait(self) -> int:
        """Wait for its end; return the exit code, minus the signal's number."""
        return self._pool.ask(wait=self.pid)


class RankPool:
    """A process that has imported everything and forks a rank whenever one is asked for.

    It has computed nothing yet, so it has no threads that a fork would lose.
    """

    def __init__(self) -> None:
        """Start it; it imports what it needs meanwhile."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
        )

    def start(self, **order: object) -> RankProcess:
        """Start a rank that joins a group."""
        return RankProcess(self, self.ask(start=order))

    def ask(self, **question: object) -> int:
        """Give the process something to do, and return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it; all of its ranks were waited for."""
        self._process.kill()
        self._process.communicate()


@dataclass
class Split:
    """A split model with its ranks."""

    executor: RankExecutor
    worker: Worker
    group: RankGroup
    ranks: list[RankProcess]
    lost: "Future[RankLost]"
    """Done when the watch has noticed a loss."""
    codes: list[int] = field(default_factory=list)
    """The other ranks' exit codes, once they were let go."""

    def execute_in_thread(self, plan: StepPlan) -> "Future[StepResult]":
        """Execute a plan that may hang for ever."""
        result: Future[StepResult] = Future()

        def run() -> None:
            try:
                result.set_result(self.executor.execute(plan))
            except Exception as error:  # for the test to look at
                result.set_exception(error)

        Thread(target=run, daemon=True).start()
        return result

    def let_go(self) -> None:
        """Do what the end of rank 0's process does, wake who was stopped, and wait for the end."""
        self.worker.close()
        for link in self.group.links.values():
            link.close()
        self.group._watch.stop()
        self.group._watch.close()
        for rank in self.ranks:
            rank.send(signal.SIGCONT)
        self.codes = [rank.wait() for rank in self.ranks]
        self.group.collectives.close()


def let_ranks_share_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Compute over Gloo and name no device, in this process: NCCL wants a device for each rank."""
    patch.setitem(collectives.BACKENDS, "cuda", "gloo")
    patch.setattr(rank_group, "identity", lambda _device: "")


def join(
    pool: RankPool, path: Path, ranks: int, device: torch.device = CPU, **order: object
) -> Split:
    """Load a checkpoint over `ranks` processes, this one rank 0; `order` changes what others do."""
    port = free_port()
    order |= {"path": str(path), "ranks": ranks, "port": port, "device": device.type}
    others = [pool.start(rank=rank, **order) for rank in range(1, ranks)]
    group = RankGroup.join(RankPlace(0, ranks, "127.0.0.1", port), {}, device, WAIT_S)
    lost: Future[RankLost] = Future()
    group.call_on_loss(lost.set_result)
    worker = Worker.load(path, _options(device, order), group=group)
    return Split(RankExecutor(worker, group), worker, group, others, lost)


@contextmanager
def split_model(
    pool: RankPool,
    path: Path,
    ranks: int = 2,
    num_blocks: int = 60,
    num_host_blocks: int = 0,
    **order: Any,  # `join`'s
) -> Iterator[Split]:
    """Give a split model with a small cache, and end it in good order unless a rank is lost."""
    split = join(pool, path, ranks, **order)
    limits = StepLimits(max_running=8, max_step_tokens=64, max_context_tokens=512)
    split.executor.spare_memory(find_free_memory, limits)
    split.executor.allocate_cache(num_blocks, num_host_blocks, bool(num_host_blocks), limits)
    try:
        yield split
    finally:
        if split.lost.done():
            split.let_go()
        else:
            split.executor.close()
            assert [rank.wait() for rank in split.ranks] == [0] * (ranks - 1)


def _options(device: torch.device, order: Mapping[str, Any]) -> WorkerOptions:
    return WorkerOptions(
        order.get("dtype", "float32"),
        num_threads=1,
        block_size_tokens=BLOCK_SIZE,
        device=device,
        quantization=order.get("quantization", "none"),
        quantization_include=tuple(order.get("include", ())),
    )


class FaultyCollectives:
    """Collectives of a rank that gets a signal in the middle of a step."""

    def __init__(self, sound: Collectives, at: int, number: int) -> None:
        """Raise signal `number` instead of entering the collective `at`, counted from 0."""
        self._collectives = sound
        self._at = at
        self._number = number

    def __getattr__(self, name: str) -> object:
        return getattr(self._collectives, name)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum, or not."""
        if self._collectives.num_entered == self._at:
            os.kill(os.getpid(), self._number)
        return self._collectives.all_reduce(tensor)


class FaultyCopier:
    """A copier whose process may die, that may raise, or leave pairs of source 0 out."""

    def __init__(self, copier: BlockCopier, fault: str) -> None:
        self._copier = copier
        self._fault = fault
        self.device, self.host = copier.device, copier.host
        self.work_so_far = copier.work_so_far
        self.device_checksum = copier.device_checksum

    def copy(self, direction: CopyDirection, pairs: Pairs) -> None:
        """Copy, in a way."""
        if self._fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fault == "raise":
            raise RuntimeError("the bus is broken")
        if self._fault == "leave out":
            pairs = [(source, target) for source, target in pairs if source != 0]
        self._copier.copy(direction, pairs)


class FaultyWorker(Worker):
    """A worker whose copies or steps may have a fault."""

    copies = ""
    raises_at = -1
    """Step that raises here and nowhere else."""

    def allocate_cache(
        self,
        num_device_blocks: int,
        num_host_blocks: int = 0,
        audit: bool = False,
        limits: StepLimits | None = None,
    ) -> None:
        """Reserve the cache, and put the fault in."""
        super().allocate_cache(num_device_blocks, num_host_blocks, audit, limits)
        assert isinstance(self._runner, ModelRunner)
        transfer = self._runner._transfer
        transfer._copier = FaultyCopier(transfer._copier, self.copies)

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one plan, or not."""
        if plan.step_id == self.raises_at:
            raise ValueError("this rank alone")
        return super().execute(plan)


def _become(order: dict[str, Any]) -> None:
    place = RankPlace(order["rank"], order["ranks"], "127.0.0.1", order["port"])
    device = torch.device(order["device"])
    if device.type == "cuda":
        if order.get("shares_gpu"):
            let_ranks_share_a_gpu(pytest.MonkeyPatch())
        device = find_device(order.get("local_rank", order["rank"]))
    group = RankGroup.join(place, {}, device, WAIT_S)
    if "signal" in order:
        group.collectives = FaultyCollectives(  # type: ignore[assignment]
            group.collectives, order["at"], order["signal"]
        )
    worker = FaultyWorker.load(Path(order["path"]), _options(device, order), group=group)
    assert isinstance(worker, FaultyWorker)
    worker.copies = order.get("copies", "")
    worker.raises_at = order.get("raises_at", -1)
    run_rank(worker, group, find_free_memory, lambda: None)


def main() -> None:
    """Fork ranks, and wait for their ends, as stdin says."""
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])
        elif not (answer := os.fork()):
            torch.set_num_threads(1)
            _become(question["start"])
            return
        print(answer, flush=True)


if __name__ == "__main__":
    main()
