"""Models loaded one after another in this process, with the other ranks' processes of a split one.

Owns their beginning and their end. Does not know what is run on them.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from rillgate_server.config.settings import Settings
from rillgate_server.errors import ConfigError, RankLost, RillgateError
from rillgate_server.replica.child import LEASH, ChildSpec
from rillgate_server.replica.children import fresh_rendezvous, rank_children
from rillgate_server.replica.devices import Machine, assign_devices
from rillgate_server.replica.process import ReadyModel, join_ranks, load_leader, load_whole
from rillgate_server.replica.rank_place import find_place
from rillgate_server.worker.compute_device import find_device
from rillgate_server.worker.worker import check_ranks

_END_S = 10.0
"""For the other ranks to end, once they were told."""


@contextmanager
def opened_model(settings: Settings, model_dir: Path) -> Iterator[ReadyModel]:
    """Load a model as the settings say, and give it up afterwards.

    Raises ConfigError, CheckpointError or OutOfMemory.
    """
    if settings.replica.rank:
        raise ConfigError(f"replica.rank is {settings.replica.rank}; allowed: 0")
    with ExitStack() as stack:
        if settings.replica.tensor_parallel_size == 1:
            ready = load_whole(settings, model_dir, find_device())
        else:
            ready = _lead(stack, settings, model_dir)
        stack.callback(ready.executor.close)
        yield ready
    del ready
    gc.collect()  # before the next one is loaded


def _lead(stack: ExitStack, settings: Settings, model_dir: Path) -> ReadyModel:
    """Start the other ranks, which end with the stack, and load this one's part."""
    num_ranks = settings.replica.tensor_parallel_size
    check_ranks(model_dir, num_ranks)
    serve = replace(settings.serve, num_replicas=1)
    settings = settings.model_copy(update={"serve": serve})
    placements = assign_devices(settings, Machine.here())[0]
    rendezvous = fresh_rendezvous()
    stack.enter_context(_processes(rank_children(settings, placements)[1:], rendezvous))
    own = replace(
        settings.replica,
        num_threads=placements[0].num_threads,
        max_memory_bytes=placements[0].max_memory_bytes,
        rendezvous=rendezvous["RILLGATE_REPLICA__RENDEZVOUS"],
    )
    settings = settings.model_copy(update={"replica": own})
    device = find_device()
    group = join_ranks(settings, model_dir, find_place(own, {}), device)
    try:
        return load_leader(settings, model_dir, device, group)
    except RillgateError as error:
        if not isinstance(error, RankLost):
            group.refuse(str(error))
        raise


@contextmanager
def _processes(specs: Sequence[ChildSpec], environment: dict[str, str]) -> Iterator[None]:
    """Start processes that die with this one, and wait for their end."""
    with ExitStack() as stack:
        for spec in specs:
            process = subprocess.Popen(
                (sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), *spec.command),
                env={**os.environ, **spec.environment, **environment},
                stdout=subprocess.DEVNULL,
            )
            stack.callback(_end, process)
        yield


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
