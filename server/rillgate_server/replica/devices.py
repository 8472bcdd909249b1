"""Which process computes where: replicas and ranks over the devices, cores and memory of a machine.

Owns the assignment, a pure decision with its errors, and the look at the machine (without torch,
which the supervisor must not load). Does not know processes.

    CUDA   one device each, in order: replica 0's ranks, then replica 1's, …
    CPU    all share the cores: each gets its part of the threads
    both   all share the memory: each gets its part of what was free before the first one started
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rillgate_server.config.settings import Settings
from rillgate_server.errors import ConfigError
from rillgate_server.worker.host_cores import usable_cores
from rillgate_server.worker.host_memory import available_bytes

CPU = "cpu"
AUTO = "auto"
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"

_DEVICE_FILE = re.compile(r"nvidia\d+")


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to share."""

    cuda_devices: tuple[str, ...]
    """What CUDA_VISIBLE_DEVICES says for cuda:0 alone, for cuda:1 alone, …"""
    num_cores: int
    memory_bytes: int
    """Free."""

    @classmethod
    def here(cls) -> "Machine":
        """Look at this one."""
        return cls(find_cuda_devices(os.environ), usable_cores(), available_bytes())


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one process computes, and its share."""

    device: str
    """`cuda:N` or `cpu`."""
    visible_devices: str | None
    """Its CUDA_VISIBLE_DEVICES: its own device alone, or none; None: as Ray has set it."""
    num_threads: int
    max_memory_bytes: int
    """0: whatever is free."""

    def __str__(self) -> str:
        """Say it to operators."""
        if self.device != CPU:
            return self.device
        return f"{CPU} with {self.num_threads} thread{'s' if self.num_threads > 1 else ''}"


def find_cuda_devices(
    environment: Mapping[str, str], folder: Path = Path("/dev")
) -> tuple[str, ...]:
    """Return how each CUDA device is named: by the environment, or all that have a device file."""
    given = environment.get(VISIBLE_DEVICES)
    if given is None:
        found = [entry for entry in folder.iterdir() if _DEVICE_FILE.fullmatch(entry.name)]
        return tuple(str(index) for index in range(len(found)))
    names = [name.strip() for name in given.split(",")]
    # CUDA itself stops at the first that is none.
    end = next((at for at, name in enumerate(names) if name in ("", "-1")), len(names))
    return tuple(names[:end])


def assign_devices(settings: Settings, machine: Machine) -> list[list[Placement]]:
    """Return a placement per replica and rank. Raises ConfigError for more than there are."""
    num_replicas = settings.serve.num_replicas
    num_ranks = settings.replica.tensor_parallel_size
    num_processes = num_replicas * num_ranks
    devices = _devices(settings.serve.devices, machine.cuda_devices)
    names = [CPU] * num_processes if CPU in devices else list(devices)
    if num_processes > len(names):
        raise ConfigError(
            f"serve.num_replicas is {num_replicas} and replica.tensor_parallel_size is "
            f"{num_ranks}, which makes {num_processes} processes; allowed: {len(names)}, one per "
            f"device ({', '.join(names)}), or serve.devices = {CPU}"
        )
    share = max(1, num_processes)
    placements = [
        Placement(
            name,
            devices[name],
            settings.replica.num_threads or max(1, machine.num_cores // share),
            settings.replica.max_memory_bytes
            or (machine.memory_bytes // share if num_processes > 1 else 0),
        )
        for name in names
    ]
    return [placements[at * num_ranks :][:num_ranks] for at in range(num_replicas)]


def _devices(text: str, cuda_devices: tuple[str, ...]) -> dict[str, str]:
    """Read serve.devices: name -> CUDA_VISIBLE_DEVICES, in the order of use."""
    there = {f"cuda:{index}": name for index, name in enumerate(cuda_devices)}
    names = [name.strip() for name in text.split(",")]
    if names == [CPU] or (names == [AUTO] and not there):
        return {CPU: ""}
    if names == [AUTO]:
        return there
    if set(names) - set(there) or len(set(names)) < len(names):
        raise ConfigError(
            f"serve.devices is {text[:200]!r}; allowed: {AUTO}, {CPU}, or each at most once and "
            f"by commas: {', '.join(there) or 'no CUDA device is here'}"
        )
    return {name: there[name] for name in names}
