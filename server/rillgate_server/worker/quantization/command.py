"""What `rillgate models quantize` runs.

Owns its progress and its last line.
"""

import sys
import time
from pathlib import Path

import torch

from rillgate_server.core.checkpoint import read_model_spec, weight_files
from rillgate_server.core.quantization import Quantization
from rillgate_server.worker.quantization.checkpoint_writer import quantize_checkpoint
from rillgate_server.worker.worker import resolve_dtype


def run_quantize(source: Path, target: Path, quantization: Quantization) -> int:
    """Write a quantised checkpoint, and say how large it is; return the exit code."""
    started_s = time.monotonic()
    # As a replica holds it with model.dtype = auto.
    dtype: torch.dtype = getattr(torch, resolve_dtype("auto", read_model_spec(source).dtype))

    def show(done_bytes: int, total_bytes: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done_bytes == total_bytes else ""
            print(f"\r{100 * done_bytes // max(1, total_bytes)} %", end=end, file=sys.stderr)

    quantize_checkpoint(source, target, quantization, dtype, show)
    before, after = (_weight_bytes(it) for it in (source, target))
    print(
        f"{target}: {after / 1e6:.1f} MB of weights in {quantization.method}, before "
        f"{before / 1e6:.1f} MB; {time.monotonic() - started_s:.1f} s"
    )
    return 0


def _weight_bytes(model_dir: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(model_dir))
