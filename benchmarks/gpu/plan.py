"""The parts of the check: who asks what, of which loaded thing, and for how long at most.

Parts of one group share a process and what it has loaded; a part that fails or takes too long ends
the process, and those behind it get a new one. Standard library alone: modules are named, and only
the process that runs a part imports them.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Group:
    """What parts are asked of. `opens` and `describes` are functions, `module:name`."""

    name: str
    opens: str
    """(work_dir, scale) -> a context manager over what is loaded; empty: nothing is, and the part
    gets the directory itself."""
    describes: str
    """(loaded, seconds) -> the row that says how long loading took."""
    start_timeout_s: float


@dataclass(frozen=True, slots=True)
class Part:
    """One question. `measures` is a function, `module:name`: (loaded, scale) -> rows."""

    name: str
    group: Group
    measures: str
    timeout_s: float
    needs: tuple[str, ...] = ()
    """Parts without whose rows its own say little."""


_BARE = Group("nothing", "", "", 60.0)
_ENGINE = "benchmarks.gpu.engine_alone"
_LARGE = Group("the engine", f"{_ENGINE}:open_large", f"{_ENGINE}:describe", 90.0)
_SMALL = Group("the engine, small", f"{_ENGINE}:open_small", f"{_ENGINE}:describe", 60.0)
_INT8 = Group("the engine, INT8", f"{_ENGINE}:open_large_int8", f"{_ENGINE}:describe", 90.0)
_SERVED = "benchmarks.gpu.served"
_SERVER = Group("a server", f"{_SERVED}:open_server", f"{_SERVED}:describe", 120.0)
_THEIRS = "benchmarks.gpu.transformers_batching"
_TRANSFORMERS = Group("transformers", f"{_THEIRS}:open_network", f"{_THEIRS}:describe", 90.0)

CHECKPOINT = "checkpoint"
PARTS = (
    Part(CHECKPOINT, _BARE, "benchmarks.gpu.weights:measure", 120.0),
    Part("limits", _BARE, "benchmarks.gpu.limits:measure", 40.0),
    Part("decode", _LARGE, "benchmarks.gpu.decode:measure", 90.0, (CHECKPOINT, "limits")),
    Part("prefill", _LARGE, "benchmarks.gpu.prefill:measure", 40.0, (CHECKPOINT, "limits")),
    Part("requests", _LARGE, "benchmarks.gpu.requests:measure", 90.0, (CHECKPOINT,)),
    Part("small", _SMALL, "benchmarks.gpu.decode:measure", 60.0, (CHECKPOINT,)),
    Part("grpc", _SERVER, f"{_SERVED}:measure_requests", 60.0, (CHECKPOINT, "requests")),
    Part("users", _SERVER, f"{_SERVED}:measure_users", 60.0, (CHECKPOINT,)),
    Part("burst", _SERVER, f"{_SERVED}:measure_burst", 40.0, (CHECKPOINT,)),
    Part("transformers", _TRANSFORMERS, f"{_THEIRS}:measure", 150.0, (CHECKPOINT, "requests")),
    Part("int8", _INT8, "benchmarks.gpu.decode:measure", 60.0, (CHECKPOINT, "limits", "decode")),
)
"""In the order in which they are asked: who comes late may find no time left."""
NAMES = tuple(part.name for part in PARTS)


def with_needs(names: Sequence[str]) -> list[Part]:
    """Return the named parts and what they need, in order."""
    by_name = {part.name: part for part in PARTS}
    wanted: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name not in wanted:
            wanted.add(name)
            pending += by_name[name].needs
    return [part for part in PARTS if part.name in wanted]


def runs_of_a_group(parts: Sequence[Part]) -> list[list[Part]]:
    """Cut parts, in their order, where the group changes."""
    runs: list[list[Part]] = []
    for part in parts:
        if runs and runs[-1][-1].group is part.group:
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs
