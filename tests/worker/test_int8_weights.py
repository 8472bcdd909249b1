"""Weights in INT8: how near they are, what a model of them gives, and what loading one takes."""

import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rillgate_server.core.checkpoint import read_model_spec
from rillgate_server.core.quantization import Quantization
from rillgate_server.errors import ConfigError
from rillgate_server.worker import worker as worker_module
from rillgate_server.worker.compute_device import CPU
from rillgate_server.worker.kernels.library import Kernels, load_kernels
from rillgate_server.worker.model_loader import WeightStore, load_config, load_network
from rillgate_server.worker.network.dense_decoder import DenseDecoder
from rillgate_server.worker.network.transformers_network import TransformersNetwork
from rillgate_server.worker.quantization.embedding import Int8Embedding
from rillgate_server.worker.quantization.int8 import Int8Linear, linear_int8, quantize_weight
from rillgate_server.worker.sharding import Sharding
from rillgate_server.worker.weight_plan import is_experts
from rillgate_server.worker.worker import Worker, WorkerOptions
from tests.support.checkpoints import KINDS, make_checkpoint, stack_experts
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


def int8_worker(
    path: Path,
    kernels: Kernels | None,
    patch: pytest.MonkeyPatch,
    exclude: tuple[str, ...] = (),
    include: tuple[str, ...] = (),
) -> Worker:
    """Load a checkpoint in float32 with INT8 weights."""
    patch.setattr(worker_module, "load_kernels", lambda: kernels)
    options = WorkerOptions(
        "float32",
        block_size_tokens=BLOCK_SIZE,
        quantization="int8",
        quantization_exclude=exclude,
        quantization_include=include,
    )
    worker = Worker.load(path, options)
    worker.allocate_cache(NUM_BLOCKS)
    return worker


def model_of(worker: Worker) -> PreTrainedModel:
    """Return a worker's modules, which are transformers' without kernels."""
    assert isinstance(worker.network, TransformersNetwork)
    return worker.network.model


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
    """A mixture's experts are, too; its router is not."""
    worker = int8_worker(checkpoint(kind), None, monkeypatch)
    model = model_of(worker)
    assert type(model.get_output_embeddings()) is nn.Linear
    linear = [m for m in model.get_decoder().modules() if isinstance(m, (nn.Linear, Int8Linear))]
    assert linear
    assert all(isinstance(layer, Int8Linear) for layer in linear)
    assert not any(map(is_experts, model.modules()))


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
    assert (spec.quantization, other.quantization) == ("none", "int8")
    assert spec.with_quantization("none") == spec


@pytest.mark.parametrize("kernels", [None, load_kernels()])
@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("qwen2", "*.down_proj"),
        ("qwen2", "model.layers.0.*"),
        ("llama", "*.q_proj"),  # joined with layers in INT8 by the kernels
        ("deepseek_v3", "*.experts.3.up_proj"),
        ("deepseek_v3", "model.layers.1.mlp.experts.*"),
    ],
)
def test_layers_that_a_pattern_matches_stay_as_they_are(
    kind: str,
    pattern: str,
    kernels: Kernels | None,
    checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In either kind of network; other tokens come out than of all layers in INT8."""
    path = checkpoint(kind)
    worker = int8_worker(path, kernels, monkeypatch, exclude=(pattern,))
    all_int8 = int8_worker(path, kernels, monkeypatch)
    jobs, _ = run_mixed(worker)
    assert [it.tokens for it in jobs] != [it.tokens for it in run_mixed(all_int8)[0]]
    if kernels is None:
        layers = dict(model_of(worker).get_decoder().named_modules())
        kept = {name for name, it in layers.items() if type(it) is nn.Linear}
        stacks = {name for name, it in layers.items() if is_experts(it)}
        assert kept or stacks == {"layers.1.mlp.experts"}
        names = {f"model.{name}" for name in kept}
        in_stack = "experts.3" in pattern  # its layer has another name there
        assert in_stack or all(fnmatchcase(name, pattern) for name in names)


def test_bf16_and_int8_layers_are_mixed_by_the_kernels(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whole joined groups; the answers are near those of torch's own layers."""
    if (kernels := load_kernels()) is None:
        pytest.skip("no kernels here")
    answers = []
    for found in (kernels, None):
        monkeypatch.setattr(worker_module, "load_kernels", lambda found=found: found)
        options = WorkerOptions(
            "bfloat16",
            block_size_tokens=BLOCK_SIZE,
            quantization="int8",
            quantization_exclude=("*.down_proj", "model.layers.1.self_attn.*"),
        )
        worker = Worker.load(checkpoint("llama"), options)
        worker.allocate_cache(NUM_BLOCKS)
        assert isinstance(worker.network, TransformersNetwork if found is None else DenseDecoder)
        answers.append(dict(run_alone(worker, mixed_prompts()[0]).logprobs[0].top))
    ours, theirs = (torch.tensor([it[i] for i in range(len(it))]) for it in answers)
    assert (ours - theirs).std() < 0.1 * theirs.std()


def test_a_pattern_that_matches_no_layer_is_refused(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, and before anything is read; the head is none unless it is asked for."""
    path = checkpoint("llama")
    for pattern in ("*.dwon_proj", "lm_head"):
        message = rf"model.quantization_exclude has '{re.escape(pattern)}', which matches none"
        with pytest.raises(ConfigError, match=message):
            int8_worker(path, None, monkeypatch, exclude=("*.down_proj", pattern))
    int8_worker(path, None, monkeypatch, exclude=("lm_head",), include=("head",))


@pytest.mark.parametrize("kernels", [None, load_kernels()])
@pytest.mark.parametrize("kind", ["qwen2", "llama-tied"])
@pytest.mark.parametrize("include", [("embeddings",), ("head",), ("head", "embeddings")])
def test_embeddings_and_head_are_quantised_on_request(
    kind: str,
    include: tuple[str, ...],
    kernels: Kernels | None,
    checkpoint: MakeCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each row by itself; where both are one tensor, one is kept for both."""
    path = checkpoint(kind)
    worker = int8_worker(path, kernels, monkeypatch, include=include)
    model = worker.network.model  # type: ignore[attr-defined]
    weights = load_file(path / "model.safetensors")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = kind == "llama-tied"
    assert isinstance(embedding, Int8Embedding) == (is_tied or "embeddings" in include)
    assert isinstance(head, Int8Linear) == (is_tied or "head" in include)
    if isinstance(embedding, Int8Embedding):
        assert not is_tied or embedding.table is head
        whole, scales = quantize_weight(weights["model.embed_tokens.weight"])
        tokens = torch.tensor([[3, 210, 3], [0, 64, 63]])
        assert torch.equal(embedding(tokens), whole[tokens] * scales[tokens][..., None])
    if isinstance(head, Int8Linear):
        name = "model.embed_tokens.weight" if is_tied else "lm_head.weight"
        hidden = torch.randn(5, 64)
        expected = linear_int8(hidden, *quantize_weight(weights[name]), None)
        logits = worker.network.logits(hidden)
        assert logits is not None
        assert torch.equal(logits, expected)
    assert len({job.tokens[0] for job in run_mixed(worker)[0]}) > 1


def test_experts_compute_what_int8_says_of_each(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit linear_int8 of each expert's own weights, over a token's own experts."""
    path = checkpoint("deepseek_v3")
    stored = load_file(path / "model.safetensors")
    experts = model_of(int8_worker(path, load_kernels(), monkeypatch)).get_submodule(
        "model.layers.2.mlp.experts"
    )
    torch.manual_seed(0)
    x, chosen = torch.randn(6, 64), torch.stack([torch.randperm(8)[:2] for _ in range(6)])
    shares = torch.rand(6, 2)

    def layer(expert: int, kind: str, rows: Tensor) -> Tensor:
        weight = stored[f"model.layers.2.mlp.experts.{expert}.{kind}_proj.weight"]
        return linear_int8(rows, *quantize_weight(weight), None)

    for token in range(6):
        total = torch.zeros(1, 64)
        for share, expert in sorted(
            zip(shares[token], chosen[token].tolist(), strict=True), key=lambda it: it[1]
        ):
            row = x[token : token + 1]
            inner = F.silu(layer(expert, "gate", row)) * layer(expert, "up", row)
            total += layer(expert, "down", inner) * share
        assert torch.equal(experts(x, chosen, shares)[token], total[0])


def test_stacked_experts_are_quantised_like_single_ones(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and a rank's part of them."""
    stacked = make_checkpoint(tmp_path / "model", "deepseek_v3")
    stack_experts(stacked)
    quantization = Quantization("int8")
    store = WeightStore(
        CPU, 1 << 40, lambda weight, _: Int8Linear(weight, None), None, quantization
    )
    single = checkpoint("deepseek_v3")
    for sharding in (None, *(Sharding(load_config(single), rank, 2) for rank in range(2))):
        ours, theirs = (
            load_network(path, torch.float32, sharding=sharding, store=store)
            for path in (single, stacked)
        )
        expected = dict(theirs.named_buffers()) | layers_of(theirs)
        got = dict(ours.named_buffers()) | layers_of(ours)
        assert expected.keys() == got.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
        sizes = {tuple(it.shape) for name, it in got.items() if ".experts.downs." in name}
        assert (64, 32 if sharding is None else 16) in sizes


def layers_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return what the layers in INT8 hold."""
    found = {name: it for name, it in model.named_modules() if isinstance(it, Int8Linear)}
    weights = {f"{name}.weight": it.weight for name, it in found.items()}
    return weights | {f"{name}.scales": it.scales for name, it in found.items()}


def test_other_layers_make_another_version(checkpoint: MakeCheckpoint) -> None:
    """The order of patterns does not; without quantisation there is nothing to say."""
    both = Quantization("int8", ("*.down_proj", "*.o_proj"))
    versions = {
        Quantization("int8").version,
        Quantization("int8", ("*.down_proj",)).version,
        both.version,
        Quantization("int8", include=("head",)).version,
        Quantization("int8", ("*.down_proj",), ("head",)).version,
    }
    assert len(versions) == 5
    assert Quantization("int8", both.exclude[::-1]).version == both.version
    spec = read_model_spec(checkpoint("llama"))
    assert spec.with_quantization(Quantization().version) == spec
    assert spec.with_quantization(both.version).version_digest.startswith(
        f"{spec.version_digest}-int8-"
    )


def test_int8_on_a_gpu_without_triton_is_refused_before_anything_is_read(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builds of torch for CPUs have none."""
    monkeypatch.setattr(worker_module, "free_bytes", lambda _device: 1 << 40)
    module = "rillgate_server.worker.quantization.int8_triton"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    options = WorkerOptions("float32", quantization="int8", device=torch.device("cuda", 0))
    with pytest.raises(ConfigError, match=r"int8 on cuda:0, which needs Triton.*allowed"):
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
