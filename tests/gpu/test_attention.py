"""Attention over blocks in real models' shapes, against float64; tests/worker has the odd ones."""

import pytest
import torch

from tests.gpu.conftest import Note
from tests.worker.test_attention import Shape
from tests.worker.test_triton_paged import TritonScene

ROWS = ((2100, 1), (300, 130), (0, 70), (15, 1), (900, 1))
SHAPES = {
    "Qwen2.5-7B": Shape(28, 4, 128, 128, 16, None, ROWS),
    "Qwen2.5-0.5B": Shape(14, 2, 64, 64, 16, None, ROWS),
    "Mistral": Shape(32, 8, 128, 128, 16, 500, ROWS),
    "DeepSeek-V3": Shape(16, 16, 192, 128, 16, None, ROWS),
}
TYPES = [
    (torch.bfloat16, "bfloat16"),
    (torch.bfloat16, "int8"),
    (torch.float16, "float16"),
    (torch.float16, "int8"),
    (torch.float32, "float32"),
]


@pytest.mark.parametrize(("dtype", "kv_dtype"), TYPES)
@pytest.mark.parametrize("model", SHAPES)
def test_attention_in_a_models_shape_is_near_float64(
    model: str, dtype: torch.dtype, kv_dtype: str, cuda: torch.device, note: Note
) -> None:
    """Decode rows in parts, chunks, windows; within what the type rounds."""
    assert cuda.type == "cuda"
    scene = TritonScene(SHAPES[model], dtype, 0, kv_dtype)
    scene.poison()
    error = (scene.actual(0.09).double() - scene.expected(0.09)).abs().max()
    note(f"largest error {error:.1e}")
    assert error < {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
