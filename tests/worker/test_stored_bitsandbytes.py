"""Checkpoints that bitsandbytes' own modules were saved in: loaded, split, and refused."""

import shutil
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rillgate_server.core.checkpoint import read_tensor_entries
from rillgate_server.core.quantization import AS_THEY_ARE, resolve_quantization
from rillgate_server.errors import CheckpointError, ConfigError
from rillgate_server.worker.compute_device import CPU
from rillgate_server.worker.memory_needs import memory_needs
from rillgate_server.worker.model_loader import WeightStore, load_config, load_network
from rillgate_server.worker.quantization.methods import with_layers
from rillgate_server.worker.quantization.stored_bitsandbytes import StoredWeights
from rillgate_server.worker.sharding import Sharding, TensorSplit
from rillgate_server.worker.worker import Worker, WorkerOptions
from tests.support.checkpoints import edit_config
from tests.support.worker_fixtures import BLOCK_SIZE, NUM_BLOCKS, MakeCheckpoint
from tests.worker.test_equality import run_mixed

CONFIGS: dict[str, dict[str, Any]] = {
    "bnb-int8": {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": 6.0,
    },
    "bnb-nf4": {
        "quant_method": "bitsandbytes",
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "uint8",
    },
}


def saved(weight: Tensor, method: str, is_double: bool) -> dict[str, Tensor]:
    """Return what a bitsandbytes module saves of a weight."""
    rows, columns = weight.shape
    module: torch.nn.Module
    if method == "bnb-int8":
        module = bitsandbytes.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        module.weight = bitsandbytes.nn.Int8Params(
            weight.half(), requires_grad=False, has_fp16_weights=False
        )
    else:
        module = bitsandbytes.nn.Linear4bit(
            columns, rows, bias=False, quant_type="nf4", compress_statistics=is_double
        )
        module.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=is_double
        )
    module = module.to("cpu")  # quantises
    return dict(module.state_dict())


def write(source: Path, target: Path, method: str, is_double: bool = False) -> Path:
    """Save a plain checkpoint as transformers saves one whose layers are bitsandbytes'."""
    shutil.copytree(source, target)
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(target / "model.safetensors").items():
        is_layer = name.endswith("_proj.weight") or name.endswith("_proj_with_mqa.weight")
        if not is_layer:
            stored[name] = tensor
            continue
        prefix = name.removesuffix("weight")
        stored.update(
            {f"{prefix}{key}": it for key, it in saved(tensor, method, is_double).items()}
        )
    save_file({k: v.contiguous() for k, v in stored.items()}, target / "model.safetensors")
    edit_config(target, quantization_config=CONFIGS[method])
    return target


def tokens_of(path: Path, quantization: str = "none") -> list[list[int]]:
    """Load a checkpoint and return what it answers to the mixed batch."""
    options = WorkerOptions("float32", block_size_tokens=BLOCK_SIZE, quantization=quantization)
    worker = Worker.load(path, options)
    worker.allocate_cache(NUM_BLOCKS)
    return [job.tokens for job in run_mixed(worker)[0]]


@pytest.mark.parametrize("method", list(CONFIGS))
@pytest.mark.parametrize("kind", ["llama", "qwen2", "deepseek_v3"])
def test_it_answers_as_if_it_were_quantised_while_it_is_read(
    kind: str, method: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """No setting is needed: the checkpoint says it; naming the method changes nothing."""
    target = write(checkpoint(kind), tmp_path / "out", method)
    assert resolve_quantization(AS_THEY_ARE, target).method == method
    assert tokens_of(target) == tokens_of(target, method) == tokens_of(checkpoint(kind), method)


@pytest.mark.parametrize(
    ("method", "is_double"), [("bnb-int8", False), ("bnb-nf4", False), ("bnb-nf4", True)]
)
def test_the_weights_are_those_that_bitsandbytes_would_compute_with(
    method: str, is_double: bool, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Also where the scales are quantised, too."""
    source = checkpoint("llama")
    target = write(source, tmp_path / "out", method, is_double)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(source / "model.safetensors")[name]
    entries = read_tensor_entries(target)
    found = StoredWeights(method, target, entries).read(name)
    parts = saved(weight, method, is_double)
    if method == "bnb-int8":
        expected = parts["weight"].float() * parts["SCB"][:, None] / 127
    else:
        prefix = {f"weight.{k}" for k in ("absmax", "quant_map")}
        assert prefix <= set(parts)
        assert ("weight.nested_absmax" in parts) == is_double
        state = bitsandbytes.functional.QuantState.from_dict(
            {k: v for k, v in parts.items() if k != "weight"}, torch.device("cpu")
        )
        expected = bitsandbytes.functional.dequantize_4bit(parts["weight"], state).float()
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    loaded = Worker.load(target, WorkerOptions("float32"))
    need = memory_needs(target).weights[0]
    assert need.is_stored
    assert need.num_bytes == pytest.approx(loaded.weights.model, rel=0.01)


@pytest.mark.parametrize("method", list(CONFIGS))
def test_a_rank_reads_its_part(method: str, checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The same values as of the whole; NF4's cut through a block of 64 is refused by name."""
    target = write(checkpoint("llama"), tmp_path / "out", method)
    sharding = Sharding(load_config(target), 1, 2)
    options = WorkerOptions("float32")
    if method == "bnb-nf4":  # o_proj [64, 64] is split by columns: 32 of 64
        with pytest.raises(CheckpointError, match=r"o_proj.weight is stored in NF4 blocks of 64"):
            load_rank(target, sharding, options)
        return
    whole = Worker.load(target, options).network.model  # type: ignore[attr-defined]
    part = load_rank(target, sharding, options)
    for name in ("q_proj", "o_proj"):
        ours = part.get_submodule(f"model.layers.0.self_attn.{name}").weight
        all_of_it = whole.get_submodule(f"model.layers.0.self_attn.{name}").weight
        own = slice(32, None)
        expected = all_of_it[own] if name == "q_proj" else all_of_it[:, own]
        assert torch.equal(ours, expected)


def load_rank(path: Path, sharding: Sharding, options: WorkerOptions) -> Any:
    """Load one rank's part of the network."""
    quantization = resolve_quantization(options.weights, path)
    store = with_layers(WeightStore(CPU, 1 << 40), quantization, None)
    return load_network(path, torch.float32, sharding=sharding, store=store)


def test_a_cut_between_blocks_is_allowed(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Rows of 96 weights: any two rows begin a block, one does not."""
    target = write(checkpoint("llama"), tmp_path / "out", "bnb-nf4")
    stored = StoredWeights("bnb-nf4", target, read_tensor_entries(target))
    name = "model.layers.0.mlp.down_proj.weight"  # [64, 96]
    stored.check_split(name, TensorSplit(0, 0, 32, 32))
    with pytest.raises(CheckpointError, match=r"rows have 96"):
        stored.check_split(name, TensorSplit(0, 0, 31, 31))
    with pytest.raises(CheckpointError, match=r"down_proj"):
        stored.check_split(name, TensorSplit(1, 0, 64, 64))


def test_missing_scales_are_named(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Before anything is loaded."""
    for method, part in (("bnb-int8", "SCB"), ("bnb-nf4", "weight.absmax")):
        target = write(checkpoint("llama"), tmp_path / method, method)
        tensors = load_file(target / "model.safetensors")
        missing = f"model.layers.1.self_attn.q_proj.{part}"
        del tensors[missing]
        save_file(tensors, target / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"not {missing}"):
            Worker.load(target, WorkerOptions("float32"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type 'fp4'; allowed: 'nf4'"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage 'bfloat16'"),
        ({"load_in_4bit": False}, "load_in_4bit False"),
    ],
)
def test_what_is_not_known_is_refused(
    change: dict[str, Any], message: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """By what the config says."""
    target = write(checkpoint("llama"), tmp_path / "out", "bnb-nf4")
    edit_config(target, quantization_config=CONFIGS["bnb-nf4"] | change)
    with pytest.raises(CheckpointError, match=message):
        load_config(target)


def test_another_method_than_the_stored_one_is_refused(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Saying which it is."""
    target = write(checkpoint("llama"), tmp_path / "out", "bnb-nf4")
    with pytest.raises(ConfigError, match=r"int8, but .* stored in bnb-nf4; allowed"):
        Worker.load(target, WorkerOptions(quantization="int8"))
