"""Compile Triton's kernels for an NVIDIA GPU on a machine that has none.

    python -m tests.support.gpu_compile tests.worker.some_module:launch_all

runs the function, whose launches compile for compute capability 9.0 (an H100 or H200) instead of
running, and prints a line of JSON for each kernel that was compiled. Arguments may be CPU tensors.
A kernel that Triton's interpreter runs may still not compile: the interpreter knows no layouts,
no limits of shared memory, and hardly any types.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MAX_SHARED_BYTES = 227 * 1024
"""Of one program on compute capability 9.0."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel as it came out."""

    name: str
    num_warps: int
    num_stages: int
    shared_bytes: int
    num_registers: int
    """Of a thread."""
    spilled_bytes: int
    """Written to memory and read again for want of registers; of a thread."""
    constants: dict[str, str]
    """Of the launch."""


def compile_launches(function: str) -> list[Compiled]:
    """Return what the launches of `module:function` compile to; raises what the compiler says."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.gpu_compile", function]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Compiled(**json.loads(line)) for line in done.stdout.splitlines()]


def _main(function: str) -> None:
    import triton  # noqa: PLC0415 - not before the environment says that it compiles
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.backends.nvidia.driver import CudaDriver  # noqa: PLC0415
    from triton.runtime.jit import JITFunction  # noqa: PLC0415

    class _NoGpu(CudaDriver):  # type: ignore[misc]  # Triton has no types
        """What the compiler asks of a driver."""

        def __init__(self) -> None:
            pass

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _device: int) -> int:
            return 0

    triton.runtime.driver.set_active(_NoGpu())
    run = JITFunction.run
    seen: set[str] = set()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            constants = {k: str(v) for k, v in kwargs.items()}
            print(json.dumps(asdict(_describe(kernel, constants))), flush=True)
        return kernel

    JITFunction.run = compile_only
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)()


def _describe(kernel: Any, constants: dict[str, str]) -> Compiled:
    from triton.backends.nvidia.compiler import get_ptxas  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"])
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert registers, said
    metadata = kernel.metadata
    return Compiled(
        metadata.name,
        metadata.num_warps,
        metadata.num_stages,
        metadata.shared,
        int(registers[1]),
        int(spilled[1]) if spilled else 0,
        constants,
    )


if __name__ == "__main__":
    _main(sys.argv[1])
