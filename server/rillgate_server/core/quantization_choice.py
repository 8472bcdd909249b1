"""What `model.quantization = auto` chose, once per machine and model.

Owns the file that a choice is written down in, below XDG_CACHE_HOME (else ~/.cache), and what it
is for: other weights, processors, devices or releases choose anew. Whoever starts first holds a
lock while it measures; the others wait and read. Does not know how a choice is made.
"""

import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rillgate_server.core.checkpoint import read_model_spec
from rillgate_server.core.release import release_of
from rillgate_server.errors import ConfigError

_RELEASES = ("rillgate", "torch", "triton")
"""Which decide how fast a method is."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A method, and why."""

    quantization: str
    """A value of model.quantization, not auto."""
    why: str
    """For operators, with the numbers."""


def recall_or_choose(
    model_dir: Path, machine: str, choose: Callable[[], Choice]
) -> tuple[Choice, Path, bool]:
    """Return the choice, the file it is in, and whether it was made now.

    Raises ConfigError where the file cannot be written.
    """
    facts = [read_model_spec(model_dir).version_digest, machine, *map(release_of, _RELEASES)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    path = _folder() / f"{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            found = _read(path)
            if found is not None:
                return found, path, False
            made = choose()
            whole = path.with_suffix(".new")
            whole.write_text(json.dumps(asdict(made), indent=1) + "\n", encoding="utf-8")
            whole.replace(path)
            return made, path, True
    except OSError as error:
        raise ConfigError(
            f"model.quantization is auto, and its choice cannot be kept in {path.parent} "
            f"({error.strerror}); allowed: XDG_CACHE_HOME, a directory that can be written, or "
            "another model.quantization"
        ) from error


def describe_machine(cpuinfo: Path = Path("/proc/cpuinfo"), num_cores: int = 0) -> str:
    """Name the processor, `num_cores` of it, and the NVIDIA devices; without torch."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    devices = sorted(
        path.read_text(encoding="utf-8").split("\n")[0].removeprefix("Model:").strip()
        for path in Path("/proc/driver/nvidia/gpus").glob("*/information")
    )
    processor = names[0] if names else platform.machine()
    return "; ".join([f"{num_cores} cores of {processor}", *devices])


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "rillgate" / "quantization"


def _read(path: Path) -> Choice | None:
    """Read a choice; None where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Choice(str(found["quantization"]), str(found["why"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
