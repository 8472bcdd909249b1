"""Which rank of a split model this process is, and where the ranks meet.

From the settings (`replica.rank`, `replica.tensor_parallel_size`, `replica.rendezvous`), or, where
they say nothing, from the environment that torchrun gives its workers. Does not know torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rillgate_server.config.groups import ReplicaConfig
from rillgate_server.errors import ConfigError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class Place:
    """A process's place among a model's ranks."""

    rank: int = 0
    ranks: int = 1
    host: str = ""
    port: int = 0
    local_rank: int = 0
    """Among the ranks that its launcher started on this machine."""
    agent_attempt: str = ""
    """Where torchrun's agent hosts the store at the address already: which of its starts of the
    workers this is."""

    @property
    def is_door(self) -> bool:
        """Whether it serves gateways: rank 0 alone does."""
        return self.rank == 0


def find_place(config: ReplicaConfig, environment: Mapping[str, str]) -> Place:
    """Return it; raises ConfigError for settings or variables that make no sense together."""
    size, rank, rendezvous = config.tensor_parallel_size, config.rank, config.rendezvous
    if (size, rank, rendezvous) == (1, 0, "") and environment.get("WORLD_SIZE", "1") != "1":
        return _from_torchrun(environment)
    if rank >= size:
        raise ConfigError(
            f"replica.rank is {rank}; allowed: 0 to {size - 1} (replica.tensor_parallel_size "
            f"is {size})"
        )
    if size == 1:
        return Place()
    if not rendezvous:
        raise ConfigError(
            f"replica.rendezvous is empty, replica.tensor_parallel_size {size}; allowed: HOST:PORT "
            "on rank 0's machine, the same for all ranks (--rendezvous HOST:PORT)"
        )
    host, _, port = rendezvous.rpartition(":")
    return Place(rank, size, host.strip("[]"), _number("replica.rendezvous' port", port, 1, 65535))


def _from_torchrun(environment: Mapping[str, str]) -> Place:
    missing = [name for name in _VARIABLES if not environment.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']} in the environment, but {missing[0]} is "
            "not set; allowed: all of " + ", ".join(_VARIABLES) + ", as torchrun sets them"
        )
    size = _number("WORLD_SIZE", environment["WORLD_SIZE"], 1, 1024)
    attempt = ""
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Place(
        _number("RANK", environment["RANK"], 0, size - 1),
        size,
        environment["MASTER_ADDR"],
        _number("MASTER_PORT", environment["MASTER_PORT"], 1, 65535),
        _number("LOCAL_RANK", environment.get("LOCAL_RANK", "0"), 0, size - 1),
        attempt,
    )


def _number(name: str, text: str, lowest: int, highest: int) -> int:
    if text.isascii() and text.isdigit() and lowest <= int(text) <= highest:
        return int(text)
    raise ConfigError(f"{name} is {text!r}; allowed: {lowest} to {highest}")
