"""INT8 weights on a GPU: the definition's bits, the CPU's tokens, and nearness to bf16."""

import pytest
import torch

from rillgate_server.worker.quantization.int8 import linear_int8, quantize_weight
from rillgate_server.worker.quantization.int8_triton import TritonInt8Linear, linear_int8_triton
from rillgate_server.worker.worker import Worker, WorkerOptions
from tests.gpu.conftest import Note
from tests.support.checkpoints import KINDS
from tests.support.equality import mixed_prompts
from tests.support.worker_fixtures import BLOCK_SIZE, NUM_BLOCKS, MakeCheckpoint
from tests.worker.test_equality import run_mixed

SHAPES = ((3584, 4608), (3584, 3584), (18944, 3584), (1000, 200))
"""(inputs, channels) of Qwen2.5-7B's layers, and what no tile divides."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 8, 16, 17, 64, 65, 300])
def test_a_product_has_the_bits_of_the_definition(
    num_rows: int, dtype: torch.dtype, cuda: torch.device
) -> None:
    """With every tile, with a bias and without."""
    torch.manual_seed(num_rows)
    for num_inputs, num_channels in SHAPES:
        x = (torch.randn(num_rows, num_inputs) * 3).to(dtype)
        whole, scales = quantize_weight(torch.randn(num_channels, num_inputs, device=cuda))
        for bias in (None, torch.randn(num_channels)):
            on_gpu = None if bias is None else bias.to(cuda)
            got = linear_int8_triton(x.to(cuda), whole, scales, on_gpu).cpu()
            assert torch.equal(got, linear_int8(x, whole.cpu(), scales.cpu(), bias))


def test_rows_that_are_zero_or_not_finite_leave_their_neighbours_alone(cuda: torch.device) -> None:
    """As the definition has it."""
    x = torch.randn(4, 64)
    x[0], x[1, 3], x[2, 5] = 0.0, torch.nan, -torch.inf
    whole, scales = quantize_weight(torch.randn(40, 64))
    got = linear_int8_triton(x.to(cuda), whole.to(cuda), scales.to(cuda), None).cpu()
    expected = linear_int8(x, whole, scales, None)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_model_gets_the_tokens_that_it_gets_on_a_cpu(
    kind: str, cuda: torch.device, checkpoint: MakeCheckpoint, note: Note
) -> None:
    """In float32: chunks beside decode rows, shared prefixes. A near tie may fall otherwise."""
    answers = []
    for device in (torch.device("cpu"), cuda):
        options = WorkerOptions(
            "float32", block_size_tokens=BLOCK_SIZE, quantization="int8", device=device
        )
        worker = Worker.load(checkpoint(kind), options)
        worker.allocate_cache(NUM_BLOCKS)
        jobs, _ = run_mixed(worker)
        answers.append([tuple(job.tokens) for job in jobs])
        worker.close()
    same = sum(on_cpu == on_gpu for on_cpu, on_gpu in zip(*answers, strict=True))
    note(f"{same} of {len(mixed_prompts())} answers the same")
    assert same >= len(mixed_prompts()) - 2


def test_a_layer_is_near_bf16(cuda: torch.device, note: Note) -> None:
    """Normally distributed numbers: within a hundredth of the products' size."""
    weight = torch.randn(3584, 3584, device=cuda, dtype=torch.bfloat16) * 0.02
    x = torch.randn(64, 3584, device=cuda, dtype=torch.bfloat16)
    exact = x.float() @ weight.float().T
    error = (TritonInt8Linear(weight)(x).float() - exact).norm() / exact.norm()
    note(f"relative error {float(error):.4f}")
    assert error < 0.015
