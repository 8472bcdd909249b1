"""What Triton 3.6's interpreter lacks, put right: bfloat16, and loaded numbers that bound a loop.

The interpreter keeps bfloat16 as uint16. It cuts where hardware rounds, takes integers for its
bits, and multiplies the bits of tiles. With numpy 2.4 a `range` takes no number that was loaded.
And numpy warns of what is no fault on a GPU: infinities, NaN, zeros that divide.
"""

import warnings
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def repair_interpreter() -> None:
    """Put it right, for the process."""
    builder = interpreter.InterpreterBuilder
    cast, fp_to_fp, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    patch_tensor, run = interpreter._patch_lang_tensor, interpreter.GridExecutor.__call__

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return cast(self, src, dst_type)
        values = _floats(src.data) if source == tl.bfloat16 else src.data
        if target == tl.bfloat16:
            return interpreter.TensorHandle(_rounded(values), target)
        return interpreter.TensorHandle(
            np.asarray(values).astype(interpreter._get_np_dtype(dst_type)), target
        )

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, *of: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a = interpreter.TensorHandle(_floats(a.data), tl.float32)
            b = interpreter.TensorHandle(_floats(b.data), tl.float32)
        return dot(self, a, b, *of)

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def run_quietly(self: Any, *arguments: Any, **constants: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            run(self, *arguments, **constants)

    interpreter.GridExecutor.__call__ = run_quietly
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_dot = create_dot
    interpreter._patch_lang_tensor = patch_with_index


def _floats(bits: Any) -> Any:
    """Return float32 of bfloat16's bits."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _rounded(values: Any) -> Any:
    """Return the bits of the nearest bfloat16s."""
    values = np.asarray(values)
    flat = torch.from_numpy(np.atleast_1d(values).astype(np.float64)).float().bfloat16()
    return flat.view(torch.uint16).numpy().reshape(values.shape)
