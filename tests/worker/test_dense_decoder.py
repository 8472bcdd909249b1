"""The C++ layers in bf16: as near to the exact model as transformers' modules, in any batch."""

from pathlib import Path

import pytest
import torch

from rillgate_server.worker import worker as worker_module
from rillgate_server.worker.attention import choice
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


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_no_further_from_the_exact_model_than_transformers_modules(
    kind: str,
    checkpoint: MakeCheckpoint,
    reference: MakeReference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both have the rounded weights; the residual stream alone is finer here."""
    path, (_, expected) = checkpoint(kind), reference(kind)
    ours = bf16_worker(path, load_kernels(), monkeypatch)
    theirs = bf16_worker(path, None, monkeypatch)
    assert isinstance(ours.network, DenseDecoder)
    assert isinstance(theirs.network, TransformersNetwork)
    assert 0.0 < error_of(ours, expected) < 1.1 * error_of(theirs, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_gets_the_same_alone_and_in_a_batch(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit in bf16, whatever is beside it, where its prompt is cut the same; with heads of
    32, which the kernels attend over."""
    path = make_checkpoint(tmp_path / kind, kind, hidden_size=128, head_dim=32)
    worker = bf16_worker(path, load_kernels(), monkeypatch)
    together = [Job(prompt, NUM_TOKENS, SAMPLING) for prompt in mixed_prompts()]
    planner = Planner(NUM_BLOCKS, BLOCK_SIZE, step_tokens=4096, chunk=4096)
    planner.run(worker, together)
    for prompt, job in zip(mixed_prompts(), together, strict=True):
        worker.allocate_cache(NUM_BLOCKS)
        alone = run_alone(worker, prompt)
        assert (alone.tokens, alone.logprobs) == (job.tokens, job.logprobs)
