"""Where a process computes: one CUDA device, or the CPU; and what memory there is.

Owns the choice and its name. Does not know how devices are shared out among processes
(replica.devices does, by CUDA_VISIBLE_DEVICES), nor what the memory is for.
"""

from collections.abc import Callable

import torch

from rillgate_server.core.load import DeviceMemory
from rillgate_server.core.model_spec import FreeMemory
from rillgate_server.worker.host_memory import available_bytes, spare_bytes

CPU = torch.device("cpu")

Device = torch.device
"""For those who hand one on without torch."""
FindFreeMemory = Callable[[], FreeMemory]


def find_device(local_rank: int = 0) -> torch.device:
    """Return the CUDA device of the process's place among those of its launcher, or the CPU.

    A supervisor shows each process its own device alone, torchrun shows all to all.
    """
    num_devices = torch.cuda.device_count()
    return torch.device("cuda", local_rank % num_devices) if num_devices else CPU


def use_device(device: torch.device) -> None:
    """Let the calling thread launch on a device: Triton's kernels go to the thread's own, which is
    the first one until somebody says so."""
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(device)


def identity(device: torch.device) -> str:
    """Name a CUDA device as no other one is named; empty for the CPU, which many may share."""
    if device.type != "cuda":
        return ""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def describe(device: torch.device) -> str:
    """Say to operators what it is."""
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


def free_bytes(device: torch.device) -> int:
    """Return what may still be taken of its memory; what torch only keeps is given back first."""
    if device.type != "cuda":
        return available_bytes()
    torch.cuda.empty_cache()
    num_bytes, _ = torch.cuda.mem_get_info(device)
    return int(num_bytes)


def free_memory(device: torch.device, max_memory_bytes: int, num_sharing: int) -> FreeMemory:
    """Return what a cache may take, of the host's memory as host_memory.spare_bytes has it."""
    host_bytes = spare_bytes(max_memory_bytes, num_sharing)
    if device.type != "cuda":
        return FreeMemory(host_bytes, host_bytes, is_shared=True)
    return FreeMemory(free_bytes(device), host_bytes, is_shared=False)


def used_memory(device: torch.device) -> DeviceMemory:
    """Return what this process has in use of a GPU; any thread may ask."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return DeviceMemory()
    _, total_bytes = torch.cuda.mem_get_info(device)
    return DeviceMemory(
        int(total_bytes),
        torch.cuda.memory_allocated(device),
        torch.cuda.memory_reserved(device),
        torch.cuda.max_memory_allocated(device),
    )


def wait_for(device: torch.device) -> None:
    """Wait for the work so far; raises what went wrong in it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
