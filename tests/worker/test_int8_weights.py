"""Weights in INT8: how near they are, what a model of them gives, and what loading one takes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rillgate_server.core.checkpoint import read_model_spec
from rillgate_server.errors import ConfigError
from rillgate_server.worker import worker as worker_module
from rillgate_server.worker.kernels.library import Kernels, load_kernels
from rillgate_server.worker.network.transformers_network import TransformersNetwork
from rillgate_server.worker.quantization.int8 import Int8Linear, linear_int8, quantize_weight
from rillgate_server.worker.worker import Worker, WorkerOptions
from tests.support.checkpoints import KINDS, make_checkpoint
from tests.support.equality import mixed_prompts
from tests.support.worker_fixtures import BLOCK_SIZE, NUM_BLOCKS, MakeCheckpoint, MakeReference
from tests.worker.test_equality import run_alone, run_mixed


def test_a_weight_is_off_by_half_a_step_at_most() -> None:
    """A channel of zeros stays zeros."""
    weight = torch.randn(40, 64) * torch.logspace(-6, 6, 40)[:, None]
    weight[7] = 0.0
    whole, scales = quantize_weight(weight)
    assert ((whole * scales[:, None] - weight).abs() <= scales[:, None] * 0.501).all()
    assert whole.abs().amax() == 127
    assert whole[7].count_nonzero() == 0


def test_a_product_is_within_a_hundredth() -> None:
    """Of normally distributed numbers, relative to the exact products' size."""
    torch.manual_seed(0)
    weight, x = torch.randn(200, 512), torch.randn(50, 512)
    exact = x @ weight.T
    error = linear_int8(x, *quantize_weight(weight), None) - exact
    assert 0.002 < error.norm() / exact.norm() < 0.012


def int8_worker(path: Path, kernels: Kernels | None, patch: pytest.MonkeyPatch) -> Worker:
    """Load a checkpoint in float32 with INT8 weights."""
    patch.setattr(worker_module, "load_kernels", lambda: kernels)
    options = WorkerOptions("float32", block_size_tokens=BLOCK_SIZE, quantization="int8")
    worker = Worker.load(path, options)
    worker.allocate_cache(NUM_BLOCKS)
    return worker


@pytest.mark.parametrize("kind", list(KINDS))
def test_int8_gives_the_same_with_kernels_and_without_alone_and_in_a_batch(
    kind: str, checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every architecture; float32 around the layers, so that no rounding of theirs decides."""
    path = checkpoint(kind)
    answers = []
    for kernels in {load_kernels(), None}:
        worker = int8_worker(path, kernels, monkeypatch)
        jobs, _ = run_mixed(worker)
        answers.append([job.tokens for job in jobs])
        for prompt, job in list(zip(mixed_prompts(), jobs, strict=True))[:4]:
            worker.allocate_cache(NUM_BLOCKS)
            assert run_alone(worker, prompt).tokens == job.tokens
    assert answers.count(answers[0]) == len(answers)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_layers_are_int8_and_the_head_is_not(
    kind: str, checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture's experts stay as they are, too."""
    worker = int8_worker(checkpoint(kind), None, monkeypatch)
    network = worker.network
    assert isinstance(network, TransformersNetwork)
    model = network.model
    assert type(model.get_output_embeddings()) is nn.Linear
    linear = [m for m in model.get_decoder().modules() if isinstance(m, (nn.Linear, Int8Linear))]
    assert linear
    assert all(isinstance(layer, Int8Linear) for layer in linear)


def test_the_logprobs_are_near_those_of_the_exact_weights(
    checkpoint: MakeCheckpoint, reference: MakeReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a random model of 64 columns, relative to how far they lie apart: some 5 %, never 0."""
    worker = int8_worker(checkpoint("qwen2"), None, monkeypatch)
    _, expected = reference("qwen2")
    for prompt, answer in list(zip(mixed_prompts(), expected, strict=True))[:4]:
        worker.allocate_cache(NUM_BLOCKS)
        got = dict(run_alone(worker, prompt).logprobs[0].top)
        exact = answer.logits[0].log_softmax(dim=-1)
        error = torch.tensor([got[i] for i in range(len(exact))]) - exact
        assert 0.001 < error.std() / exact.std() < 0.1


def test_an_int8_model_is_another_version(checkpoint: MakeCheckpoint) -> None:
    """A stream never goes on, and no block is found, across the two."""
    spec = read_model_spec(checkpoint("llama"))
    other = spec.with_quantization("int8")
    assert other.version_digest == f"{spec.version_digest}-int8"
    assert spec.with_quantization("none") == spec


def test_int8_on_a_gpu_without_triton_is_refused_before_anything_is_read(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builds of torch for CPUs have none."""
    monkeypatch.setattr(worker_module, "free_bytes", lambda _device: 1 << 40)
    module = "rillgate_server.worker.quantization.int8_triton"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    options = WorkerOptions("float32", quantization="int8", device=torch.device("cuda", 0))
    with pytest.raises(ConfigError, match=r"int8 on cuda:0, which needs Triton .*: none"):
        Worker.load(checkpoint("llama"), options)


_MEASURE = """
import sys
from pathlib import Path
import torch
from rillgate_server.worker.model_loader import load_network
from rillgate_server.worker.worker import Worker, WorkerOptions

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(l for l in lines if l.startswith("RssAnon")).split()[1]) * 1024

peak = 0

def sample(done, total):
    global peak
    peak = max(peak, anonymous_bytes())

def load(path):
    options = WorkerOptions("bfloat16", num_threads=1, quantization="int8")
    worker = Worker.load(Path(path), options, sample)
    sample(0, 0)
    return worker

load_network(Path(sys.argv[1]), torch.bfloat16)  # imports, pools
before, peak = anonymous_bytes(), 0
worker = load(sys.argv[2])
print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_loading_never_holds_both_copies(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Peak anonymous memory while 200 MB of bfloat16 become 100 of INT8 and few others."""
    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 6,
    }
    path = make_checkpoint(tmp_path / "big", "qwen2", dtype=torch.bfloat16, **sizes)
    file_bytes = (path / "model.safetensors").stat().st_size
    ran = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(checkpoint("qwen2")), str(path)],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    largest_bytes = 1024 * 4096 * 2
    # Beside what stays: the tensor being read, it in INT8, and some float32.
    assert int(ran.stdout) < 0.51 * file_bytes + 2 * largest_bytes + 16e6
