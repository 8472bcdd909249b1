"""Builds the C++ kernels into this folder: `python -m rillgate_server.worker.kernels.build`.

Part of `make setup`. Needs a C++ compiler (CXX, or g++); without one, and on other processors than
x86-64, it says so and everything runs with torch's own kernels.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "kernels.so"
_COMPILE = (
    *("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-Wall"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC 12 suspects its own intrinsics
    "-ffp-contract=off",  # every rounding is written down, and the same in torch
)


def source_digest() -> str:
    """Return a digest of all sources: a library of other ones is not used."""
    digest = hashlib.sha256(" ".join(_COMPILE).encode())
    for path in sorted((*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build() -> str | None:
    """Compile and link; return why not, if not."""
    if platform.machine() != "x86_64":
        return f"there are none for {platform.machine()}"
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        return "no C++ compiler was found (CXX, g++)"
    # torch's own OpenMP, wherever it keeps it: with two, each has threads that spin.
    packages = Path(torch.__file__).parents[1]
    found = [*packages.glob("torch/lib/libgomp*"), *packages.glob("torch.libs/libgomp*")]
    openmp = [str(path) for path in found[:1]] or ["-fopenmp"]
    defines = [f'-DRILLGATE_DIGEST="{source_digest()}"']
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source in sorted(FOLDER.glob("*.cpp")):
            objects.append(f"{folder}/{source.stem}.o")
            command = [compiler, *_COMPILE, *defines, "-c", str(source), "-o", objects[-1]]
            subprocess.run(command, check=True)
        linked = f"{folder}/linked.so"
        subprocess.run([compiler, "-shared", *objects, *openmp, "-o", linked], check=True)
        shutil.move(linked, LIBRARY)
    return None


def main() -> None:
    """Build; where that cannot be done say so, since everything runs without."""
    try:
        reason = build()
    except subprocess.CalledProcessError as error:
        reason = f"the compiler failed ({error.returncode})"
    if reason is not None:
        print(f"no kernels were built: {reason}; torch's own are used", file=sys.stderr)


if __name__ == "__main__":
    main()
