"""Checkpoints that hold their layers in INT8: written, loaded, split, and refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rillgate_server.core.checkpoint import read_model_spec
from rillgate_server.core.quantization import AS_THEY_ARE, Quantization, resolve_quantization
from rillgate_server.errors import CheckpointError, ConfigError
from rillgate_server.worker.compute_device import CPU
from rillgate_server.worker.kernels.library import load_kernels
from rillgate_server.worker.model_loader import WeightStore, load_config, load_network
from rillgate_server.worker.quantization.checkpoint_writer import quantize_checkpoint
from rillgate_server.worker.quantization.int8 import Int8Linear, linear_int8
from rillgate_server.worker.sharding import Sharding
from rillgate_server.worker.worker import Worker, WorkerOptions
from tests.support.checkpoints import KINDS, edit_config, make_checkpoint, stack_experts
from tests.support.worker_fixtures import BLOCK_SIZE, NUM_BLOCKS, MakeCheckpoint
from tests.worker.test_equality import run_mixed

INT8 = Quantization("int8")
STORE = WeightStore(
    CPU,
    1 << 40,
    restore=lambda weight, scales: Int8Linear(weight, None, scales),
    quantization=Quantization("int8", is_stored=True),
)
"""For what is stored in INT8."""


def quantizing(quantization: Quantization) -> WeightStore:
    """Return a store for plain checkpoints."""
    return WeightStore(
        CPU,
        1 << 40,
        quantize=lambda weight, channels: Int8Linear(weight, None, None, channels),
        quantization=quantization,
    )


def write(source: Path, target: Path, quantization: Quantization = INT8) -> Path:
    """Quantise a checkpoint of float32."""
    quantize_checkpoint(source, target, quantization, torch.float32)
    return target


def tokens_of(path: Path, **options: object) -> list[list[int]]:
    """Load a checkpoint and return what it answers to the mixed batch."""
    worker = Worker.load(
        path,
        WorkerOptions("float32", block_size_tokens=BLOCK_SIZE, **options),  # type: ignore[arg-type]
    )
    worker.allocate_cache(NUM_BLOCKS)
    return [job.tokens for job in run_mixed(worker)[0]]


@pytest.mark.parametrize(
    ("kind", "exclude", "include"),
    [
        *((kind, (), ()) for kind in KINDS),
        ("qwen2", ("*.down_proj",), ("embeddings", "head")),
        ("llama-tied", (), ("head",)),
        ("deepseek_v3", ("*.experts.3.*", "*.layers.2.*"), ()),
    ],
)
def test_it_answers_as_if_it_were_quantised_while_it_is_read(
    kind: str,
    exclude: tuple[str, ...],
    include: tuple[str, ...],
    checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    """No setting is needed: the checkpoint says it; naming the method changes nothing."""
    source = checkpoint(kind)
    target = write(source, tmp_path / "out", Quantization("int8", exclude, include))
    expected = tokens_of(
        source,
        quantization="int8",
        quantization_exclude=exclude,
        quantization_include=include,
    )
    assert tokens_of(target) == tokens_of(target, quantization="int8") == expected


def test_stacked_experts_and_shards_become_the_same_tensors(tmp_path: Path) -> None:
    """One tensor per expert; several files stay several, with an index of what is in them."""
    one = make_checkpoint(tmp_path / "one", "deepseek_v3")
    many = make_checkpoint(tmp_path / "many", "deepseek_v3", max_shard_size="60KB")
    stacked = make_checkpoint(tmp_path / "stacked", "deepseek_v3")
    stack_experts(stacked)
    outputs = [write(path, tmp_path / "out" / path.name) for path in (one, many, stacked)]
    found: list[dict[str, Tensor]] = []
    for path in outputs:
        files = sorted(path.glob("*.safetensors"))
        found.append({k: v for file in files for k, v in load_file(file).items()})
    assert len(list(outputs[1].glob("*.safetensors"))) > 3
    index = json.loads((outputs[1] / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found[1].keys()
    assert index["metadata"]["total_size"] == sum(it.nbytes for it in found[1].values())
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())
    assert found[0]["model.layers.1.mlp.experts.3.up_proj.weight"].dtype == torch.int8


def test_other_files_are_copied_and_plain_weights_are_not(tmp_path: Path) -> None:
    """config.json says how the weights are held, and which layers are not."""
    source = make_checkpoint(tmp_path / "model", "llama")
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"plain")
    target = write(source, tmp_path / "out", Quantization("int8", ("*.o_proj",)))
    assert (target / "tokenizer.json").read_text() == "{}"
    assert (target / "generation_config.json").is_file()
    assert not (target / "pytorch_model.bin").exists()
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    left_out = [f"model.layers.{i}.self_attn.o_proj" for i in range(3)]
    assert config["ignore"] == ["lm_head", *left_out]
    plain = json.loads((source / "config.json").read_text())
    assert json.loads((target / "config.json").read_text()) == {
        **plain,
        "quantization_config": config,
    }
    with safe_open(target / "model.safetensors", "pt") as file:
        scales = file.get_tensor("model.layers.0.mlp.up_proj.weight_scale")
    assert (scales.dtype, tuple(scales.shape)) == (torch.float32, (96, 1))


@pytest.mark.parametrize("is_stored", [True, False], ids=["stored", "plain"])
@pytest.mark.parametrize("kind", ["qwen2", "deepseek_v3", "qwen3"])
def test_each_rank_holds_its_own_part(
    kind: str, is_stored: bool, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """With the scales of whole channels, whether it reads or makes them: rows are cut with theirs,
    columns keep them."""
    include = ("embeddings", "head") if kind == "qwen3" else ()
    quantization = Quantization("int8", include=include)
    path = write(checkpoint(kind), tmp_path / "out", quantization)
    stored = load_file(path / "model.safetensors")
    store = STORE if is_stored else quantizing(quantization)
    path = path if is_stored else checkpoint(kind)
    parts = []
    for rank in range(2):
        sharding = Sharding(load_config(path), rank, 2)
        network = load_network(path, torch.float32, sharding=sharding, store=store)
        parts.append({n: m for n, m in network.named_modules() if isinstance(m, Int8Linear)})
    assert parts[0]
    for name, first in parts[0].items():
        both = first, parts[1][name]
        by_rows = first.in_features == stored_weight(stored, name).shape[1]
        whole = torch.cat([it.weight for it in both], dim=0 if by_rows else 1)
        expected = stored_weight(stored, name)
        scales = torch.cat([it.scales for it in both]) if by_rows else first.scales
        if len(first.weight) == len(expected) and by_rows:  # whole on every rank
            whole, scales = first.weight, first.scales
        assert torch.equal(whole[: len(expected)], expected), name  # zeros fill the vocabulary up
        expected_scales = stored_weight(stored, name, "weight_scale")[:, 0]
        assert torch.equal(scales[: len(expected)], expected_scales), name


def stored_weight(stored: dict[str, Tensor], name: str, kind: str = "weight") -> Tensor:
    """Return what a file has for a module of a network."""
    name = name.replace("embed_tokens.table", "embed_tokens")
    for ours, theirs in (("gates", "gate_proj"), ("ups", "up_proj"), ("downs", "down_proj")):
        prefix, found, expert = name.partition(f".experts.{ours}.")
        name = f"{prefix}.experts.{expert}.{theirs}" if found else name
    return stored[f"{name}.{kind}"]


@pytest.mark.parametrize("kernels", [load_kernels(), None])
def test_checkpoints_of_others_may_use_the_lowest_value(kernels: object) -> None:
    """-128, which ours never do, with kernels and without."""
    torch.manual_seed(0)
    weight = torch.randint(-128, 128, (70, 33), dtype=torch.int8)
    weight[0] = -128
    scales, x = torch.rand(70) / 100, torch.randn(5, 33)
    layer = Int8Linear(weight, kernels, scales)  # type: ignore[arg-type]
    layer.pack()
    exact = x @ (weight.float() * scales[:, None]).T
    assert torch.equal(layer(x), linear_int8(x, weight, scales, None))
    assert (layer(x) - exact).norm() / exact.norm() < 0.012


def change(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite a checkpoint's tensors."""
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def edit_scheme(path: Path, part: str, **changes: object) -> None:
    """Change how config.json says that weights or activations are quantised."""
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"][part] |= changes
    edit_config(path, quantization_config=config)


def edit_quantization(path: Path, **changes: object) -> None:
    """Change config.json's quantization_config."""
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    edit_config(path, quantization_config=config | changes)


UP = "model.layers.0.mlp.up_proj"

FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "scales are missing": (
        lambda p: change(p, lambda t: t.pop(f"{UP}.weight_scale")),
        f"1 missing: {UP}.weight_scale",
    ),
    "scales are of another shape": (
        lambda p: change(p, lambda t: t.update({f"{UP}.weight_scale": torch.ones(96, 4)})),
        r"1 of another shape: .*up_proj.weight_scale \[96, 4\] instead of \[96, 1\]",
    ),
    "scales are whole numbers": (
        lambda p: change(
            p, lambda t: t.update({f"{UP}.weight_scale": torch.ones(96, 1, dtype=torch.int8)})
        ),
        r"1 of a type that it cannot have: .*up_proj.weight_scale \(int8\)",
    ),
    "a weight is of another shape": (
        lambda p: change(
            p, lambda t: t.update({f"{UP}.weight": torch.ones(96, 32, dtype=torch.int8)})
        ),
        r"1 of another shape: .*up_proj.weight \[96, 32\]",
    ),
    "zero points": (
        lambda p: edit_scheme(p, "weights", symmetric=False),
        "weights.symmetric False; allowed: True",
    ),
    "four bits": (
        lambda p: edit_scheme(p, "weights", num_bits=4),
        "weights.num_bits 4; allowed: 8",
    ),
    "groups of weights": (
        lambda p: edit_scheme(p, "weights", strategy="group"),
        "weights.strategy 'group'; allowed: 'channel'",
    ),
    "one scale for all activations": (
        lambda p: edit_scheme(p, "input_activations", dynamic=False),
        "input_activations.dynamic False; allowed: True",
    ),
    "another format": (
        lambda p: edit_quantization(p, format="pack-quantized"),
        "format 'pack-quantized'; allowed: int-quantized",
    ),
    "another method": (
        lambda p: edit_quantization(p, quant_method="gptq"),
        "quant_method 'gptq'; allowed: compressed-tensors",
    ),
    "nothing says that it is quantised": (
        lambda p: edit_config(p, quantization_config=None),
        r"unexpected: .*weight_scale.*of a type that it cannot have: .*weight \(int8\)",
    ),
    "another architecture": (
        lambda p: edit_config(p, architectures=["GPT2LMHeadModel"]),
        "GPT2LMHeadModel; supported",
    ),
    "another size": (lambda p: edit_config(p, intermediate_size=100), r"of another shape: .*\[100"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_quantised_checkpoint_gets_a_precise_error(
    fault: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Before anything is read."""
    spoil, message = FAULTS[fault]
    path = write(checkpoint("llama"), tmp_path / "out")
    spoil(path)
    with pytest.raises(CheckpointError, match=message):
        Worker.load(path, WorkerOptions(dtype="float32"))


def test_settings_that_contradict_the_checkpoint_are_refused(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Which layers are quantised is the checkpoint's to say, and so is the method."""
    path = write(checkpoint("llama"), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"model.quantization_exclude is \['x'\].*allowed: none"):
        resolve_quantization(Quantization("int8", exclude=("x",)), path)
    with pytest.raises(ConfigError, match=r"model.quantization_include is \['head'\]"):
        resolve_quantization(Quantization("int8", include=("head",)), path)
    with pytest.raises(ConfigError, match=r"model.quantization is other, but .* allowed: none"):
        resolve_quantization(Quantization("other"), path)


def test_it_is_another_version_whatever_setting_names_it(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """A gateway and a replica of different, agreeing settings serve the same version."""
    path = write(checkpoint("llama"), tmp_path / "out")
    versions = {resolve_quantization(it, path).version for it in (AS_THEY_ARE, INT8)}
    assert versions == {"int8"}
    plain = read_model_spec(checkpoint("llama"))
    assert read_model_spec(path).version_digest != plain.version_digest
    assert read_model_spec(path).dtype == plain.dtype


def test_writing_is_refused_where_something_would_be_lost(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """A directory with something in it, or what is quantised already; nothing is left behind."""
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes").write_text("mine")
    with pytest.raises(ConfigError, match=r"full is not empty; allowed"):
        write(checkpoint("llama"), full)
    empty = tmp_path / "empty"
    empty.mkdir()
    path = write(checkpoint("llama"), empty)
    with pytest.raises(CheckpointError, match=r"empty is quantised already"):
        write(path, tmp_path / "again")
    with pytest.raises(ConfigError, match=r"'nothing', which matches none"):
        write(checkpoint("llama"), tmp_path / "none", Quantization("int8", ("nothing",)))
    assert sorted(it.name for it in tmp_path.iterdir()) == ["empty", "full"]


def test_a_layer_that_was_left_out_is_a_plain_one(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Its type in the file decides."""
    path = write(checkpoint("qwen2"), tmp_path / "out", Quantization("int8", ("*.layers.1.*",)))
    model = load_network(path, torch.float32, store=STORE)
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear
    assert isinstance(model.model.layers[2].mlp.up_proj, Int8Linear)
