"""The GPU's fused layers, here in Triton's interpreter: what transformers' modules compute."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rillgate_server.core.model_spec import KVLayout
from rillgate_server.core.quantization import Quantization
from rillgate_server.worker.attention.base import AttentionBackend, PackedStep
from rillgate_server.worker.attention.sdpa import SdpaAttention
from rillgate_server.worker.collectives import Collectives
from rillgate_server.worker.input_batch import TokenRun, pack_runs
from rillgate_server.worker.kv_storage import KVStorage
from rillgate_server.worker.model_loader import WeightStore, load_config, load_network
from rillgate_server.worker.network.base import Network
from rillgate_server.worker.network.gpu_decoder import GpuDecoder, can_compute
from rillgate_server.worker.network.transformers_network import (
    TransformersNetwork,
    layer_cache_shapes,
)
from rillgate_server.worker.quantization.int8_triton import TritonInt8Linear
from rillgate_server.worker.sharding import Sharding, connect_embedding
from tests.support.checkpoints import make_checkpoint
from tests.support.rank_threads import run_ranks
from tests.support.reading_attention import GatheringAttention
from tests.support.worker_fixtures import BLOCK_SIZE, MakeCheckpoint

KINDS = ("llama", "llama-tied", "qwen2", "qwen2-windows", "qwen3", "mistral")
CUDA = torch.device("cuda")
CPU = torch.device("cpu")
DEVICE = CUDA if torch.cuda.is_available() else CPU
NUM_BLOCKS = 24


def make_steps() -> list[PackedStep]:
    """Return steps of two sequences: chunks of both, a decode row beside a chunk, two decode rows,
    a decode row alone."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 211, (2, 40), generator=generator).tolist()
    tables = torch.randperm(NUM_BLOCKS - 2, generator=generator).view(2, -1)

    def run(sequence: int, start: int, end: int) -> TokenRun:
        return TokenRun(start, tokens[sequence][start:end], tables[sequence])

    return [
        pack_runs(runs, BLOCK_SIZE)
        for runs in (
            [run(0, 0, 17), run(1, 0, 5)],
            [run(0, 17, 18), run(1, 5, 19)],
            [run(1, 19, 20), run(0, 18, 19)],
            [run(0, 19, 20)],
        )
    ]


def padded(step: PackedStep, num_tokens: int) -> PackedStep:
    """Put rows of padding behind a step, as a captured graph has them."""

    def fill(tensor: Tensor, value: int) -> Tensor:
        return torch.cat([tensor, torch.full((num_tokens,), value)])

    blocks, offsets = step.slot_mapping
    return replace(
        step,
        token_ids=fill(step.token_ids, 0),
        positions=fill(step.positions, 0),
        slot_mapping=(fill(blocks, -1), fill(offsets, 0)),
    )


def make_storage(model: PreTrainedModel, kv_dtype: str, ranks: int = 1) -> KVStorage:
    """Reserve a cache for a model."""
    shapes = layer_cache_shapes(model.config, ranks)
    return KVStorage(KVLayout.build(BLOCK_SIZE, kv_dtype, shapes), NUM_BLOCKS, device=DEVICE)


@torch.inference_mode()
def run_steps(network: Network, attention: AttentionBackend, steps: list[PackedStep]) -> Tensor:
    """Return the hidden states of all steps' tokens."""
    found = []
    for step in steps:
        own = step.on(DEVICE)
        hidden = network.hidden(own.token_ids, own.positions, attention.prepare(own))
        found.append(hidden[: sum(row.num_tokens for row in step.rows)])
    return torch.cat(found)


def run_ours(
    model: PreTrainedModel, kv_dtype: str, steps: list[PackedStep]
) -> tuple[Tensor, KVStorage]:
    """Run steps through the fused layers."""
    assert can_compute(model, CUDA)
    storage = make_storage(model, kv_dtype)
    return run_steps(GpuDecoder(model), GatheringAttention(storage), steps), storage


def run_theirs(model: PreTrainedModel, kv_dtype: str, steps: list[PackedStep]) -> Tensor:
    """Run steps through transformers' modules."""
    attention = SdpaAttention(make_storage(model, kv_dtype), model.dtype)
    return run_steps(TransformersNetwork(model), attention, steps)


def load(path: Path, dtype: torch.dtype = torch.float32, **of_store: Any) -> PreTrainedModel:
    """Load a checkpoint onto the device."""
    return load_network(path, dtype, store=WeightStore(DEVICE, 1 << 30, **of_store))


def load_int8(path: Path, *, include: tuple[str, ...] = ()) -> PreTrainedModel:
    """Load a checkpoint with its layers in INT8, in float32."""
    return load(
        path,
        quantize=lambda weight, channels: TritonInt8Linear(weight, None, channels),
        quantization=Quantization("int8", include=include),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_they_compute_what_transformers_modules_do(kind: str, checkpoint: MakeCheckpoint) -> None:
    """In float32: chunks and decode rows, and the head on top."""
    models = [load(checkpoint(kind)) for _ in range(2)]
    ours, _ = run_ours(models[0], "float32", make_steps())
    theirs = run_theirs(models[1], "float32", make_steps())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    logits = GpuDecoder(load(checkpoint(kind))).logits(ours)
    expected = TransformersNetwork(models[1]).logits(theirs)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_cache_in_int8_is_filled_as_the_cache_fills_itself(
    kind: str, checkpoint: MakeCheckpoint
) -> None:
    """On hardware but for an element on the border between two integers; the interpreter cuts the
    scales, where the largest elements then are bounded."""
    ours, _ = run_ours(load(checkpoint(kind)), "int8", make_steps())
    theirs = run_theirs(load(checkpoint(kind)), "int8", make_steps())
    exact = run_theirs(load(checkpoint(kind)), "float32", make_steps())
    error = float((ours - exact).std() / (theirs - exact).std())
    assert 0.5 < error < (1.3 if DEVICE == CPU else 1.1)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_padding_changes_nothing(kv_dtype: str, checkpoint: MakeCheckpoint) -> None:
    """Rows get what they get, and the cache holds what it holds."""
    alone, own = run_ours(load(checkpoint("qwen2")), kv_dtype, make_steps())
    steps = [padded(step, 3) for step in make_steps()]
    beside, storage = run_ours(load(checkpoint("qwen2")), kv_dtype, steps)
    # A product of another number of rows may sum in another order.
    bound = 1e-4 if kv_dtype == "float32" else 0.05
    torch.testing.assert_close(beside, alone, rtol=0.0, atol=bound)
    assert own.bytes[:-2].any(dim=1).sum() == storage.bytes[:-2].any(dim=1).sum()
    assert not storage.bytes[-2:].any()


def test_in_bf16_they_are_as_near_to_the_exact_model_as_transformers_modules(
    checkpoint: MakeCheckpoint,
) -> None:
    """Nearer, on hardware; the interpreter cuts where it should round."""
    path = checkpoint("qwen3")
    exact = run_theirs(load(path), "float32", make_steps())
    ours, _ = run_ours(load(path, torch.bfloat16), "bfloat16", make_steps())
    theirs = run_theirs(load(path, torch.bfloat16), "bfloat16", make_steps())
    errors = [float((it.float() - exact).std()) for it in (ours, theirs)]
    assert 0.0 < errors[0] < errors[1] * (1.3 if DEVICE == CPU else 1.1)


@pytest.mark.parametrize("include", [(), ("embeddings", "head")])
def test_layers_in_int8_are_joined_in_int8(
    include: tuple[str, ...], checkpoint: MakeCheckpoint
) -> None:
    """Their channels and scales are those of the layers; biases stay."""
    path = checkpoint("qwen2")
    ours, _ = run_ours(load_int8(path, include=include), "float32", make_steps())
    theirs = run_theirs(load_int8(path, include=include), "float32", make_steps())
    exact = run_theirs(load(path), "float32", make_steps())
    # An activation on the border between two integers may fall otherwise.
    assert (ours - theirs).std() < 0.2 * (exact - theirs).std()
    logits = GpuDecoder(load_int8(path, include=include)).logits(ours)
    assert logits is not None
    assert logits.shape == (len(ours), 211)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen3", {}), ("qwen2", {})],
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_compute_what_one_does(
    kind: str, changes: dict[str, Any], ranks: int, tmp_path: Path
) -> None:
    """With biases of what is summed, which one of them adds; heads of keys on two ranks each."""
    path = make_checkpoint(tmp_path / kind, kind, **changes)
    steps = make_steps()

    def compute(collectives: Collectives) -> tuple[Tensor, Tensor | None]:
        sharding = Sharding(load_config(path), collectives.rank, ranks)
        store = WeightStore(DEVICE, 1 << 30)
        model = load_network(path, torch.float32, sharding=sharding, store=store)
        connect_embedding(model, collectives)
        assert can_compute(model, CUDA)
        network = GpuDecoder(model, collectives)
        storage = make_storage(model, "float32", ranks)
        hidden = run_steps(network, GatheringAttention(storage), steps)
        with torch.inference_mode():
            return hidden, network.logits(hidden)

    found = run_ranks(ranks, compute)
    theirs = load(path)
    expected = run_theirs(theirs, "float32", steps)
    for hidden, logits in found:
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
        assert logits is None or logits is found[0][1]
    torch.testing.assert_close(
        found[0][1], TransformersNetwork(theirs).logits(expected), rtol=1e-4, atol=1e-3
    )


def test_what_they_cannot_compute_is_left_to_transformers(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """CPUs, other architectures, types, activations, and layers that cannot be joined."""
    assert not can_compute(load(checkpoint("qwen2")), CPU)
    assert not can_compute(load(checkpoint("deepseek_v3")), CUDA)
    assert not can_compute(load(checkpoint("llama"), torch.float64), CUDA)
    relu = make_checkpoint(tmp_path / "relu", "llama", hidden_act="relu")
    assert not can_compute(load(relu), CUDA)
    mixed = load(checkpoint("qwen2"))
    attention = mixed.get_decoder().layers[1].self_attn
    attention.k_proj = TritonInt8Linear(attention.k_proj.weight.detach())
    assert not can_compute(mixed, CUDA)


def test_a_models_layers_are_gone_once_it_is_taken_over(checkpoint: MakeCheckpoint) -> None:
    """One layer at a time is there twice."""
    model = load(checkpoint("llama"))
    num_layers = model.config.num_hidden_layers
    network = GpuDecoder(model)
    assert len(network._layers) == num_layers
    assert len(model.get_decoder().layers) == 0
