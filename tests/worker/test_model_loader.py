"""Loading: every way in which a checkpoint can be wrong, shards, ties, types, and memory."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from rillgate_server.errors import CheckpointError, ConfigError, OutOfMemory, RillgateError
from rillgate_server.worker.model_loader import load_network
from rillgate_server.worker.worker import Worker, WorkerOptions
from tests.support.checkpoints import VOCAB_SIZE, edit_config, make_checkpoint, stack_experts
from tests.support.worker_fixtures import MakeCheckpoint

Spoil = Callable[[Path], None]


def logits_of(model: PreTrainedModel) -> Tensor:
    """Run a network through transformers' own attention."""
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits: Tensor = model(torch.arange(20)[None]).logits
    return logits


def cut(path: Path, num_bytes: int) -> None:
    """Keep only the first bytes of a file."""
    with path.open("r+b") as file:
        file.truncate(num_bytes)


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite a checkpoint's tensors."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def drop_tensor(path: Path, name: str) -> None:
    """Rewrite a checkpoint without one tensor."""
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def drop_shard(path: Path) -> None:
    """Make the checkpoint claim a second file."""
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def widen(path: Path) -> None:
    """Let config.json ask for wider tensors than the file has."""
    edit_config(path, intermediate_size=100)


def claim_huge_header(path: Path) -> None:
    """Write a file that is no safetensors file."""
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + bytes(100))


NORM = "model.norm.weight"
HEAD = "lm_head.weight"

BAD_CHECKPOINTS: dict[str, tuple[Spoil, str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "has no config.json"),
    "config is not JSON": (lambda p: cut(p / "config.json", 30), "config.json is not JSON"),
    "no weights": (
        lambda p: (p / "model.safetensors").unlink(),
        "neither model.safetensors nor model.safetensors.index.json",
    ),
    "a shard is missing": (drop_shard, "lacks 1 of the 2 weight files.*model-00002-of-00002"),
    "data is truncated": (
        lambda p: cut(p / "model.safetensors", 100_000),
        r"truncated: its header describes \d+ bytes, the file has 100000",
    ),
    "header is truncated": (
        lambda p: cut(p / "model.safetensors", 50),
        r"truncated: its header needs \d+ bytes, the file has 50",
    ),
    "file is empty": (lambda p: cut(p / "model.safetensors", 0), "truncated: it has 0 bytes"),
    "not safetensors": (claim_huge_header, "no safetensors file"),
    "other architecture": (
        lambda p: edit_config(p, architectures=["GPT2LMHeadModel"]),
        "GPT2LMHeadModel; supported: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, "
        "MistralForCausalLM, DeepseekV3ForCausalLM",
    ),
    "no architecture": (lambda p: edit_config(p, architectures=None), "none named"),
    "no vocabulary size": (lambda p: edit_config(p, vocab_size=None), "vocab_size is None"),
    "a tensor is missing": (
        lambda p: drop_tensor(p, NORM),
        f"1 missing: {NORM}",
    ),
    "a tensor too many": (
        lambda p: change_tensors(p, lambda t: t.update(stranger=torch.zeros(2))),
        "1 unexpected: stranger",
    ),
    "other shapes": (widen, r"of another shape: .*gate_proj.weight \[96, 64\] instead of \[100"),
    "quantised": (
        lambda p: edit_config(p, quantization_config={"quant_method": "fp8"}),
        "quantised with quant_method 'fp8'; allowed: compressed-tensors in 8-bit integers",
    ),
    "a config that transformers refuses": (
        lambda p: edit_config(p, hidden_size="wide"),
        "(?s)config.json is refused: .*hidden_size",
    ),
    "heads that do not divide": (
        lambda p: edit_config(p, num_attention_heads=5),
        "(?s)config.json is refused: .*not a multiple.*5",
    ),
    "frequencies follow the batch": (
        lambda p: edit_config(
            p, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        ),
        "type 'dynamic'",
    ),
}


@pytest.mark.parametrize("fault", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_gets_a_precise_error(fault: str, tmp_path: Path) -> None:
    """One CheckpointError that names what is wrong, before anything is served."""
    spoil, message = BAD_CHECKPOINTS[fault]
    path = make_checkpoint(tmp_path / "model", "llama")
    spoil(path)
    with pytest.raises(CheckpointError, match=message):
        Worker.load(path, WorkerOptions(dtype="float32"))


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The path is in the message."""
    with pytest.raises(CheckpointError, match=r"nowhere is not a directory"):
        Worker.load(tmp_path / "nowhere", WorkerOptions())


def test_weights_that_do_not_fit_say_needed_and_free(tmp_path: Path) -> None:
    """A sparse file of a few terabytes: refused before anything is read."""
    path = make_checkpoint(tmp_path / "model", "llama")
    huge = 1 << 33
    tensors = load_file(path / "model.safetensors")
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        if shape[0] == VOCAB_SIZE:
            shape[0] = huge
        num_bytes = 2
        for size in shape:
            num_bytes *= size
        header[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path / "model.safetensors", 8 + len(text) + offset)
    edit_config(path, vocab_size=huge, dtype="bfloat16")
    with pytest.raises(OutOfMemory, match=r"needs \d+.*free: \d+") as caught:
        Worker.load(path, WorkerOptions())
    assert caught.value.needed_bytes > 2 * huge * 64 * 2
    assert 0 < caught.value.free_bytes < 1 << 45


def test_shards_hold_the_same_model(tmp_path: Path) -> None:
    """Many small files load to the same logits as one file."""
    one = make_checkpoint(tmp_path / "one", "qwen3")
    many = make_checkpoint(tmp_path / "many", "qwen3", max_shard_size="100KB")
    assert len(list(many.glob("*.safetensors"))) > 3
    networks = [load_network(path, torch.float32) for path in (one, many)]
    assert torch.equal(*map(logits_of, networks))


def test_a_tied_model_keeps_one_tensor(tmp_path: Path) -> None:
    """Head and embedding share their memory, also when the file has both."""
    path = make_checkpoint(tmp_path / "model", "llama-tied")
    assert HEAD not in load_file(path / "model.safetensors")
    plain = load_network(path, torch.float32)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    change_tensors(path, lambda t: t.update({HEAD: t["model.embed_tokens.weight"].clone()}))
    both = load_network(path, torch.float32)
    assert both.lm_head.weight is both.model.embed_tokens.weight
    assert torch.equal(logits_of(plain), logits_of(both))


def test_experts_load_stacked_or_one_by_one(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Published checkpoints have a tensor per expert; stacked ones load, too."""
    path = make_checkpoint(tmp_path / "model", "deepseek_v3")
    names = load_file(path / "model.safetensors")
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in names
    single = load_network(path, torch.float32)
    stack_experts(path)
    stacked = load_network(path, torch.float32)
    assert torch.equal(logits_of(single), logits_of(stacked))


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    """One expert's tensor is a part of the stack: without it the stack is not whole."""
    path = make_checkpoint(tmp_path / "model", "deepseek_v3")
    drop_tensor(path, "model.layers.2.mlp.experts.5.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"missing: model.layers.2.mlp.experts.gate_up_proj"):
        load_network(path, torch.float32)


def test_the_routing_bias_stays_in_float32(tmp_path: Path) -> None:
    """DeepSeek-V3's router picks experts with it; bf16 would pick others."""
    path = make_checkpoint(tmp_path / "model", "deepseek_v3", dtype=torch.bfloat16)
    network = load_network(path, torch.bfloat16)
    gate = network.model.layers[1].mlp.gate
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert gate.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("asked", "stored", "got"),
    [
        ("auto", torch.bfloat16, "bfloat16"),
        ("auto", torch.float32, "float32"),
        ("auto", torch.float16, "bfloat16"),
        ("float32", torch.bfloat16, "float32"),
        ("bfloat16", torch.float32, "bfloat16"),
    ],
)
def test_the_type_is_the_checkpoints_or_the_one_asked_for(
    asked: str, stored: torch.dtype, got: str, tmp_path: Path
) -> None:
    """float16, which CPUs compute slowly, becomes bfloat16."""
    path = make_checkpoint(tmp_path / "model", "llama", dtype=stored)
    worker = Worker.load(path, WorkerOptions(dtype=asked))
    assert worker.spec.dtype == got
    assert worker.layout.layers[0].segments[0].dtype == got


def test_an_unknown_type_is_a_setting_error(tmp_path: Path) -> None:
    """The message lists what is allowed."""
    path = make_checkpoint(tmp_path / "model", "llama")
    with pytest.raises(ConfigError, match=r"is int3; allowed on a cpu: auto, bfloat16, float32"):
        Worker.load(path, WorkerOptions(dtype="int3"))


def test_progress_counts_every_byte(checkpoint: MakeCheckpoint) -> None:
    """From nothing to all, never back."""
    seen: list[tuple[int, int]] = []
    Worker.load(
        checkpoint("qwen2"),
        WorkerOptions(dtype="float32"),
        lambda done, total: seen.append((done, total)),
    )
    totals = {total for _, total in seen}
    assert len(totals) == 1
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] > 100_000


def test_executing_before_there_is_a_cache_is_refused(checkpoint: MakeCheckpoint) -> None:
    """A bug of ours, said as one."""
    worker = Worker.load(checkpoint("llama"), WorkerOptions(dtype="float32"))
    with pytest.raises(RillgateError, match="before allocate_cache"):
        worker.execute(None)  # type: ignore[arg-type]


_MEASURE = """
import sys
from pathlib import Path
from rillgate_server.worker.worker import Worker, WorkerOptions

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(l for l in lines if l.startswith("RssAnon")).split()[1]) * 1024

tiny, path, dtype = sys.argv[1:]
Worker.load(Path(tiny), WorkerOptions(dtype=dtype, num_threads=1))  # imports, pools
before = anonymous_bytes()
peak = 0

def sample(done, total):
    global peak
    peak = max(peak, anonymous_bytes())

worker = Worker.load(Path(path), WorkerOptions(dtype=dtype, num_threads=1), sample)
sample(0, 0)
print(peak - before, sum(p.numel() for p in worker.network.model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_never_holds_the_weights_twice(
    dtype: str, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Peak anonymous memory of loading 200 MB: the weights, one tensor and some change."""
    path = make_checkpoint(
        tmp_path / "big",
        "qwen2",
        dtype=torch.bfloat16,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        vocab_size=8000,
    )
    file_bytes = (path / "model.safetensors").stat().st_size
    assert file_bytes > 180e6
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(checkpoint("qwen2")), str(path), dtype],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak_bytes, num_parameters = map(int, done.stdout.split())
    weight_bytes = file_bytes * (2 if dtype == "float32" else 1)
    assert num_parameters > 90e6 or dtype == "bfloat16"
    assert weight_bytes * 0.95 < peak_bytes < weight_bytes * 1.15
