"""The process group of a split model, and the few collectives that its layers need.

Owns torch.distributed: NCCL where ranks compute on CUDA devices, Gloo on CPUs. Does not know
layers (worker.sharding puts the calls in), plans, or how a lost rank is noticed (worker.rank_watch
does): a collective whose peer died raises at once, one whose peer hangs never comes back.

Every rank enters the same collectives in the same order; `num_entered` tells whether two ranks
stopped at the same place.
"""

import os
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store  # torch.distributed's, typed

from rillgate_server.errors import RankLost

_TIMEOUT = timedelta(hours=1)
"""Of a collective. Only a backstop: a long step of another rank is no fault, and a rank that hangs
is found by its silence, in seconds."""

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


class Collectives:
    """What ranks do together. Called from the one thread that computes.

    State: the process group, which is torch's own and global, and `num_entered`.
    """

    def __init__(
        self, store: Store, rank: int, ranks: int, device: torch.device, address: str
    ) -> None:
        """Join the group; returns once all ranks have. `address` is this machine's own, as the
        others reach it: it says which network interface is used."""
        _use_interface_of(address)
        self.rank = rank
        self.ranks = ranks
        self.num_entered = 0
        self.is_on_device = BACKENDS[device.type] == "nccl"
        """Whether they run in the device's stream, without the host."""
        try:
            dist.init_process_group(
                BACKENDS[device.type],
                store=store,
                rank=rank,
                world_size=ranks,
                timeout=_TIMEOUT,
                # NCCL then connects here and now, and an error is one of the start.
                device_id=device if BACKENDS[device.type] == "nccl" else None,
            )
        except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
            raise RankLost(f"rank {rank} of {ranks} could not join its group: {error}") from error

    def __repr__(self) -> str:
        """Show who this is."""
        return f"Collectives(rank={self.rank}, ranks={self.ranks}, num_entered={self.num_entered})"

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; all get the same bits. Raises RankLost."""
        self.num_entered += 1
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise self._lost("all-reduce", error) from error
        return tensor

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """Join [num_rows, num_columns] of all ranks side by side on rank 0; None elsewhere."""
        self.num_entered += 1
        parts = None
        if self.rank == 0:
            parts = [torch.empty_like(tensor) for _ in range(self.ranks)]
        try:
            dist.gather(tensor.contiguous(), parts, dst=0)
        except RuntimeError as error:
            raise self._lost("gather", error) from error
        return None if parts is None else torch.cat(parts, dim=-1)

    def close(self) -> None:
        """Leave the group. Hangs where a collective hangs: a process that lost a rank just ends."""
        dist.destroy_process_group()

    def _lost(self, what: str, error: RuntimeError) -> RankLost:
        reason = str(error).splitlines()[0]
        return RankLost(f"rank {self.rank} of {self.ranks}: a collective ({what}) broke: {reason}")


def _use_interface_of(address: str) -> None:
    """Let Gloo and NCCL talk over the interface that has `address`, unless somebody chose one.

    On their own they take the host name's address, which often is a loopback's.
    """
    for interface, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(variable, interface)
            return
