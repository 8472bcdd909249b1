"""The C++ layers in bf16: as near to the exact model as transformers' modules, in any batch."""

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rillgate_server.worker import worker as worker_module
from rillgate_server.worker.attention import choice
from rillgate_server.worker.kernels.build import LEVELS
from rillgate_server.worker.kernels.library import Kernels, load_kernels
from rillgate_server.worker.network.dense_decoder import DenseDecoder
from rillgate_server.worker.network.transformers_network import TransformersNetwork
from rillgate_server.worker.worker import Worker
from tests.support.checkpoints import make_checkpoint
from tests.support.equality import NUM_TOKENS, mixed_prompts
from tests.support.planner import Job, Planner
from tests.support.reference import Reference
from tests.support.worker_fixtures import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    MakeCheckpoint,
    MakeReference,
    load_worker,
)
from tests.worker.test_equality import SAMPLING, run_alone

KINDS = ("llama", "llama-tied", "qwen2", "qwen2-windows", "qwen3", "mistral")
pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ kernels here")


def bf16_worker(path: Path, kernels: Kernels | None, patch: pytest.MonkeyPatch) -> Worker:
    """Load a checkpoint in bf16 with kernels, or as where there are none."""
    for module in (worker_module, choice):
        patch.setattr(module, "load_kernels", lambda: kernels)
    return load_worker(path, "bfloat16")


def error_of(worker: Worker, expected: list[Reference]) -> float:
    """Return how far the first tokens' log-probabilities are off, over some prompts."""
    errors = []
    for prompt, answer in list(zip(mixed_prompts(), expected, strict=True))[:6]:
        worker.allocate_cache(NUM_BLOCKS)
        got = dict(run_alone(worker, prompt).logprobs[0].top)
        exact = answer.logits[0].log_softmax(dim=-1)
        errors.append(torch.tensor([got[i] for i in range(len(exact))]) - exact)
    return float(torch.cat(errors).std())


LEVELS_OF_KINDS = [
    *((kind, "") for kind in KINDS),  # the processor's own
    *((kind, level) for kind in ("qwen2", "qwen3") for level in ("avx512-vnni", "avx2")),
]


def kernels_of(level: str) -> Kernels:
    """Return a level's kernels, where the processor can run them."""
    found = load_kernels(level)
    if found is None:
        pytest.skip(f"no C++ kernels for {level} here: not built, or not this processor's")
    return found


@pytest.mark.parametrize(("kind", "level"), LEVELS_OF_KINDS)
def test_they_are_no_further_from_the_exact_model_than_transformers_modules(
    kind: str,
    level: str,
    checkpoint: MakeCheckpoint,
    reference: MakeReference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both have the rounded weights; the residual stream alone is finer here."""
    path, (_, expected) = checkpoint(kind), reference(kind)
    ours = bf16_worker(path, kernels_of(level), monkeypatch)
    theirs = bf16_worker(path, None, monkeypatch)
    assert isinstance(ours.network, DenseDecoder)
    assert isinstance(theirs.network, TransformersNetwork)
    assert 0.0 < error_of(ours, expected) < 1.1 * error_of(theirs, expected)


@pytest.mark.skipif(
    (kernels := load_kernels()) is not None and not kernels.has_attention,
    reason="torch computes attention here, which is not the same bit for bit in any batch",
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_gets_the_same_alone_and_in_a_batch_however_it_is_cut(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit in bf16: prompts in pieces beside one another, and each alone in one; with heads
    of 32, which the kernels attend over."""
    path = make_checkpoint(tmp_path / kind, kind, hidden_size=128, head_dim=32)
    worker = bf16_worker(path, load_kernels(), monkeypatch)
    together = [Job(prompt, NUM_TOKENS, SAMPLING) for prompt in mixed_prompts()]
    planner = Planner(NUM_BLOCKS, BLOCK_SIZE, step_tokens=40, chunk=15)
    planner.run(worker, together)
    for prompt, job in zip(mixed_prompts(), together, strict=True):
        worker.allocate_cache(NUM_BLOCKS)
        alone = run_alone(worker, prompt)
        assert (alone.tokens, alone.logprobs) == (job.tokens, job.logprobs)


@pytest.mark.parametrize("level", list(LEVELS))
@pytest.mark.parametrize("num_rows", [256, 257, 600])
def test_many_rows_go_through_a_layer_in_parts_that_nobody_sees(
    num_rows: int, level: str, checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gets, bit for bit, what it gets alone."""
    kernels = kernels_of(level)
    network = bf16_worker(checkpoint("qwen3"), kernels, monkeypatch).network
    assert isinstance(network, DenseDecoder)
    torch.manual_seed(0)
    all_rows = torch.randn(num_rows, network.model.config.hidden_size)
    angles = torch.randn(2, num_rows, network.model.config.head_dim)
    together = through_a_layer(network, kernels, all_rows, angles)
    for row in (0, 254, num_rows - 1):
        own = slice(row, row + 1)
        alone = through_a_layer(network, kernels, all_rows[own], angles[:, own])
        for got, expected in zip(together, alone, strict=True):
            assert torch.equal(got[..., own, :], expected)


def through_a_layer(
    network: DenseDecoder, kernels: Kernels, x: Tensor, angles: Tensor
) -> tuple[Tensor, ...]:
    """Return the first layer's queries, keys, values, and what its MLP makes of x."""
    shape, layer = (ctypes.byref(it) for it in (network._shape, network._layers[0].struct))
    num_heads, num_kv_heads, dim = network._heads
    query, key, value = into = tuple(
        torch.empty(heads, len(x), dim, dtype=torch.bfloat16)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    cosines, sines = angles.contiguous()
    kernels.into_attention(shape, layer, x, (cosines, sines), (query, key, value))
    sums = torch.zeros_like(x)
    kernels.add_mlp(shape, layer, x, sums)
    return (*into, sums)
