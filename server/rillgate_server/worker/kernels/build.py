"""Builds the C++ kernels into this folder: `python -m rillgate_server.worker.kernels.build`.

Part of `make setup`. One library per level of x86-64 processors, whatever the one here is. Needs a
C++ compiler (CXX, or g++); without one, and on other processors than x86-64, it says so and
everything runs with torch's own kernels.
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
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "fma")
LEVELS = {
    "avx512": (*_AVX512, "avx512bf16"),
    "avx512-vnni": _AVX512,
    "avx2": ("avx2", "fma"),
}
"""Name -> what a processor must have, in GCC's words; the fastest first."""
_OF_ONE_LEVEL = {"attention.cpp": "avx512"}
"""Sources that are written for that level alone: in others torch computes what they would."""
_COMPILE = (
    *("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-Wall"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC 12 suspects its own intrinsics
    "-ffp-contract=off",  # every rounding is written down, and the same in torch
)


def library_of(level: str) -> Path:
    """Return where the library of one of LEVELS is, or will be."""
    return FOLDER / f"kernels-{level}.so"


def source_digest() -> str:
    """Return a digest of all sources: a library of other ones is not used."""
    digest = hashlib.sha256(repr((_COMPILE, LEVELS, _OF_ONE_LEVEL)).encode())
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
    for level in LEVELS:
        _build_level(level, compiler, openmp)
    return None


def _build_level(level: str, compiler: str, openmp: list[str]) -> None:
    """Compile for one level, and link."""
    needed = LEVELS[level]
    is_supported = " && ".join(f'__builtin_cpu_supports("{name}")' for name in needed)
    defines = [f'-DRILLGATE_DIGEST="{source_digest()}"', f"-DRILLGATE_IS_SUPPORTED={is_supported}"]
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source in sorted(FOLDER.glob("*.cpp")):
            if _OF_ONE_LEVEL.get(source.name, level) != level:
                continue
            # What asks for the processor runs on any.
            instructions = [] if source.name == "processor.cpp" else [f"-m{it}" for it in needed]
            objects.append(f"{folder}/{source.stem}.o")
            command = [compiler, *_COMPILE, *instructions, *defines]
            subprocess.run([*command, "-c", str(source), "-o", objects[-1]], check=True)
        linked = f"{folder}/linked.so"
        subprocess.run([compiler, "-shared", *objects, *openmp, "-o", linked], check=True)
        shutil.move(linked, library_of(level))


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
