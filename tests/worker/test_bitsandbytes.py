"""bitsandbytes' layers: near the exact products, of plain weights, refused where missing."""

import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import nn

from rillgate_server.core.quantization import Quantization
from rillgate_server.errors import ConfigError
from rillgate_server.worker.network.transformers_network import TransformersNetwork
from rillgate_server.worker.quantization import bitsandbytes_layers
from rillgate_server.worker.quantization.bitsandbytes_layers import BnbInt8Linear, BnbNf4Linear
from rillgate_server.worker.worker import Worker, WorkerOptions
from tests.support.checkpoints import KINDS
from tests.support.equality import mixed_prompts
from tests.support.worker_fixtures import BLOCK_SIZE, NUM_BLOCKS, MakeCheckpoint, MakeReference
from tests.worker.test_equality import run_alone, run_mixed

LAYERS = {"bnb-int8": BnbInt8Linear, "bnb-nf4": BnbNf4Linear}


def bnb_worker(path: Path, method: str, exclude: tuple[str, ...] = ()) -> Worker:
    """Load a checkpoint in float32 with such layers."""
    options = WorkerOptions(
        "float32",
        block_size_tokens=BLOCK_SIZE,
        quantization=method,
        quantization_exclude=exclude,
    )
    worker = Worker.load(path, options)
    worker.allocate_cache(NUM_BLOCKS)
    return worker


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llm_int8_is_near_the_exact_product_also_with_outliers(dtype: torch.dtype) -> None:
    """A column of outliers, for nothing, would take the other columns' bits without a threshold."""
    torch.manual_seed(0)
    weight, x, bias = torch.randn(96, 256), torch.randn(7, 256), torch.randn(96)
    x[:, 5] *= 200
    weight[:, 5] = 0.0
    exact = x.double() @ weight.double().T + bias.double()
    errors = []
    for threshold in (6.0, 0.0):
        layer = BnbInt8Linear(weight.to(dtype), threshold)
        layer.bias = nn.Parameter(bias, requires_grad=False)
        got = layer(x.to(dtype))
        assert got.dtype == dtype
        errors.append(float((got.double() - exact).norm() / exact.norm()))
    with_outliers, without = errors
    assert with_outliers < 0.01
    assert with_outliers < 0.5 * without


def test_a_cut_in_llm_int8_has_the_scales_of_whole_channels() -> None:
    """What bitsandbytes itself makes of the whole, bit by bit; a channel of zeros stays one."""
    torch.manual_seed(0)
    channels = torch.randn(96, 256)
    channels[7] = 0.0
    whole = BnbInt8Linear(channels, 6.0)
    part = BnbInt8Linear(channels[:, 64:128], 6.0, channels)
    assert torch.equal(part.weight, whole.weight[:, 64:128])
    assert torch.equal(part.scales, whole.scales)


@pytest.mark.parametrize("columns", [256, 96])  # 96: rows are no whole blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_computes_with_the_weights_that_it_keeps(dtype: torch.dtype, columns: int) -> None:
    """Which are within a tenth or so of the exact ones, in a quarter of bf16's memory and a bit."""
    torch.manual_seed(0)
    weight, x, bias = torch.randn(96, columns), torch.randn(7, columns), torch.randn(96)
    layer = BnbNf4Linear(weight.to(dtype))
    layer.bias = nn.Parameter(bias, requires_grad=False)
    kept = layer.plain_weight().double()
    assert 0.02 < float((kept - weight.double()).norm() / weight.norm()) < 0.12
    for rows in (x, x[:1], x[None]):
        exact = rows.to(dtype).double() @ kept.T + bias.double()
        got = layer(rows.to(dtype))
        assert got.dtype == dtype
        assert got.shape == exact.shape
        assert float((got.double() - exact).norm() / exact.norm()) < 0.01
    assert layer.weight.nbytes + layer.scales.nbytes == weight.numel() / 2 + weight.numel() / 16


@pytest.mark.parametrize("method", list(LAYERS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_architecture_answers_with_them(
    kind: str, method: str, checkpoint: MakeCheckpoint
) -> None:
    """All linear layers but the head are such, a mixture's experts, too."""
    worker = bnb_worker(checkpoint(kind), method)
    assert isinstance(worker.network, TransformersNetwork)
    model = worker.network.model
    linear = [m for m in model.get_decoder().modules() if hasattr(m, "in_features")]
    assert linear
    assert {type(layer) for layer in linear} == {LAYERS[method]}
    assert type(model.get_output_embeddings()) is nn.Linear
    jobs, _ = run_mixed(worker)
    assert all(job.tokens for job in jobs)


@pytest.mark.parametrize(("method", "most"), [("bnb-int8", 0.1), ("bnb-nf4", 1.0)])
def test_the_logprobs_are_near_those_of_the_exact_weights(
    method: str, most: float, checkpoint: MakeCheckpoint, reference: MakeReference
) -> None:
    """Of a random model of 64 columns, relative to how far they lie apart."""
    worker = bnb_worker(checkpoint("qwen2"), method)
    _, expected = reference("qwen2")
    for prompt, answer in list(zip(mixed_prompts(), expected, strict=True))[:4]:
        worker.allocate_cache(NUM_BLOCKS)
        got = dict(run_alone(worker, prompt).logprobs[0].top)
        exact = answer.logits[0].log_softmax(dim=-1)
        error = torch.tensor([got[i] for i in range(len(exact))]) - exact
        assert 0.001 < error.std() / exact.std() < most


def test_excluded_layers_stay_as_they_are(checkpoint: MakeCheckpoint) -> None:
    """By name."""
    worker = bnb_worker(checkpoint("llama"), "bnb-nf4", ("*.down_proj",))
    assert isinstance(worker.network, TransformersNetwork)
    layers = dict(worker.network.model.get_decoder().named_modules())
    plain = {name for name, it in layers.items() if isinstance(it, nn.Linear)}
    assert plain == {name for name in layers if name.endswith("down_proj")}


def test_the_threshold_makes_another_version_of_llm_int8_alone() -> None:
    """It changes tokens there."""
    usual, other = (Quantization("bnb-int8", bnb_int8_threshold=it) for it in (6.0, 5.0))
    assert usual.version == "bnb-int8"
    assert other.version.startswith("bnb-int8-")
    assert Quantization("int8", bnb_int8_threshold=5.0).version == "int8"


def test_they_are_refused_where_bitsandbytes_is_missing(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the way to get it, before anything is read."""
    monkeypatch.delitem(sys.modules, bitsandbytes_layers.__name__)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"bnb-nf4 on cpu, which needs bitsandbytes .*pip"):
        bnb_worker(checkpoint("llama"), "bnb-nf4")


def test_they_are_refused_on_a_device_that_bitsandbytes_does_not_support(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is read, saying what can be had."""
    supported = set(bitsandbytes.supported_torch_devices) - {"cpu"}
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", supported)
    with pytest.raises(ConfigError, match=r"bnb-int8 on cpu, .* does not support; allowed: none"):
        bnb_worker(checkpoint("llama"), "bnb-int8")
