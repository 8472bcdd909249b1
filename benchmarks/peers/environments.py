"""The peers' environments, and the checkpoints that their own tools convert: made once, kept.

    .bench/<peer>/            a virtual environment, of benchmarks/peers/<peer>.txt
    .bench/llamacpp-source/   what converts to GGUF, from the source package
    .bench/converted/         checkpoints

Does not know what is measured.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contestants.protocol import Contestant
from benchmarks.results_file import ROOT

BENCH = ROOT / ".bench"
_CONVERTED = BENCH / "converted"
_LLAMA_PACKAGE = "llama-cpp-python"
_LLAMA_OPTIONS = "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF"
"""All that this processor has."""


class PeerMissing(Exception):
    """A peer that cannot be had here; says why."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A server, with its weights in one precision."""

    server: str
    """`openvino` or `llamacpp`."""
    precision: str
    """`int8`, `q8_0` or `bf16`."""

    @property
    def name(self) -> str:
        """Say it as rows and ratios do."""
        return f"{self.server}_{self.precision}"


PEERS = tuple(
    Peer(server, precision)
    for server, precisions in (("openvino", ("int8", "bf16")), ("llamacpp", ("q8_0", "bf16")))
    for precision in precisions
)


def start(peer: Peer, model_dir: Path, make: bool) -> Contestant:
    """Load a checkpoint of ours in a peer, converted.

    `make`: install and convert what is not there. Raises PeerMissing.
    """
    try:
        python = _environment(peer.server, make)
        if peer.server == "openvino":
            path = _openvino_checkpoint(peer, python, model_dir, make)
            return Contestant(
                "benchmarks.contestants.openvino_batching", [str(path), peer.precision], python
            )
        path = _gguf_file(peer, python, model_dir, make)
        return Contestant("benchmarks.contestants.llamacpp_batch", [str(path)], python)
    except RuntimeError as error:
        raise PeerMissing(f"{peer.name}: {error}") from error


def _environment(server: str, make: bool) -> Path:
    """Return the Python of a peer's environment."""
    directory = BENCH / server
    requirements = Path(__file__).parent / f"{server}.txt"
    installed = directory / "installed.txt"
    python = directory / "bin" / "python"
    if installed.exists() and installed.read_text() == requirements.read_text():
        return python
    _refuse_unless(make, f"not installed in {directory.relative_to(ROOT)}")
    print(f"installing {server} (some minutes)", flush=True)
    shutil.rmtree(directory, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(directory)])
    _run(
        [
            *(str(python), "-m", "pip", "install", "--quiet", "--no-deps"),
            *("--no-binary", _LLAMA_PACKAGE, "-r", str(requirements)),
        ],
        {"CMAKE_ARGS": _LLAMA_OPTIONS},
    )
    shutil.copy(requirements, installed)
    return python


def _openvino_checkpoint(peer: Peer, python: Path, model_dir: Path, make: bool) -> Path:
    """Let optimum-intel convert; bf16 is computed from weights kept in fp16, as it has no bf16."""
    kept = "int8" if peer.precision == "int8" else "fp16"
    path = _CONVERTED / f"{model_dir.name}-openvino-{kept}"
    if path.exists():
        return path
    _refuse_unless(make, f"no {path.relative_to(ROOT)}")
    print(f"converting {model_dir.name} for {peer.name}", flush=True)
    unfinished = path.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    _run(
        [
            *(str(python), "-m", "optimum.commands.optimum_cli", "export", "openvino"),
            *("--model", str(model_dir), "--task", "text-generation-with-past"),
            *("--weight-format", kept, str(unfinished)),
        ],
        {"HF_HUB_OFFLINE": "1"},
    )
    return unfinished.rename(path)


def _gguf_file(peer: Peer, python: Path, model_dir: Path, make: bool) -> Path:
    """Let llama.cpp's converter write the weights, `q8_0` or `bf16`."""
    path = _CONVERTED / f"{model_dir.name}-{peer.precision}.gguf"
    if path.exists():
        return path
    _refuse_unless(make, f"no {path.relative_to(ROOT)}")
    print(f"converting {model_dir.name} for {peer.name}", flush=True)
    source = _llamacpp_source(python)
    unfinished = path.with_suffix(".unfinished")
    path.parent.mkdir(parents=True, exist_ok=True)
    _run(
        [
            *(str(python), "-m", "benchmarks.peers.llamacpp_convert", str(source), str(model_dir)),
            *("--outtype", peer.precision, "--outfile", str(unfinished)),
        ]
    )
    return unfinished.rename(path)


def _llamacpp_source(python: Path) -> Path:
    """Take llama.cpp out of the source package that was built."""
    directory = BENCH / "llamacpp-source"
    requirements = (Path(__file__).parent / "llamacpp.txt").read_text().splitlines()
    (pinned,) = (line for line in requirements if line.startswith(f"{_LLAMA_PACKAGE}=="))
    package = f"{pinned.replace('-', '_').replace('==', '-')}"
    source = directory / package / "vendor" / "llama.cpp"
    if not source.exists():
        _run(
            [
                *(str(python), "-m", "pip", "download", "--quiet", "--no-deps"),
                *("--no-binary", _LLAMA_PACKAGE, "--dest", str(directory), pinned),
            ]
        )
        with tarfile.open(directory / f"{package}.tar.gz") as archive:
            archive.extractall(directory, filter="data")
    return source


def _refuse_unless(make: bool, what: str) -> None:
    if not make:
        raise RuntimeError(f"{what} (`make bench-peers` makes it)")


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a command from the root; raises RuntimeError with the end of what it said."""
    outcome = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if outcome.returncode:
        said = (outcome.stderr or outcome.stdout).strip().splitlines()[-3:]
        raise RuntimeError(f"{' '.join(command[:4])} … ended with {outcome.returncode}: {said}")
