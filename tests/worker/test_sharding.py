"""The split: whose part is what, what does not divide, and what a rank holds while it loads."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rillgate_server.errors import ConfigError
from rillgate_server.worker.model_loader import load_config, load_network
from rillgate_server.worker.sharding import Sharding, check_split, heads_of_rank
from rillgate_server.worker.worker import check_ranks
from tests.support.checkpoints import KINDS, make_checkpoint
from tests.support.worker_fixtures import MakeCheckpoint

SUMS_INPUTS = ("o_proj.weight", "down_proj.weight")
WHOLE = ("norm.weight", "layernorm.weight", "gate.weight", "a_proj.weight", "with_mqa.weight")


def own_part(name: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """Cut a file's tensor as the architecture's description says, with plain indexing."""
    if name.endswith((*WHOLE, "q_norm.weight", "k_norm.weight", "e_score_correction_bias")):
        return tensor
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = -(-len(tensor) // ranks)
        part = tensor[rank * rows : (rank + 1) * rows]
        return torch.cat([part, torch.zeros(rows - len(part), tensor.shape[1])])
    if name.endswith(SUMS_INPUTS):
        return tensor.chunk(ranks, dim=1)[rank]
    if ".k_proj." in name or ".v_proj." in name:
        heads = tensor.reshape(2, -1, *tensor.shape[1:])  # two heads of keys and values
        mine = heads[rank * 2 // ranks : max(1, 2 // ranks) + rank * 2 // ranks]
        return mine.flatten(0, 1)
    return tensor.chunk(ranks, dim=0)[rank]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_has_exactly_its_part_of_every_tensor(
    kind: str, ranks: int, checkpoint: MakeCheckpoint
) -> None:
    """The files' tensors, cut by hand, are what the rank's network holds; the experts stacked."""
    path = checkpoint(kind)
    stored = load_file(path / "model.safetensors")
    for rank in range(ranks):
        sharding = Sharding(load_config(path), rank, ranks)
        own = dict(load_network(path, torch.float32, sharding=sharding).state_dict())
        for name, tensor in stored.items():
            if ".experts." in name:
                continue
            assert torch.equal(own[name], own_part(name, tensor, rank, ranks)), name
        for name, tensor in own.items():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                assert torch.equal(tensor, _stacked(name, stored, rank, ranks)), name


def _stacked(name: str, stored: dict[str, Tensor], rank: int, ranks: int) -> Tensor:
    prefix, _, kind = name.rpartition(".")

    def cut(expert: int, which: str) -> Tensor:
        tensor = stored[f"{prefix}.{expert}.{which}.weight"]
        return tensor.chunk(ranks, dim=1 if which == "down_proj" else 0)[rank]

    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    return torch.stack([torch.cat([cut(i, which) for which in parts]) for i in range(8)])


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 3, "num_attention_heads 4, num_key_value_heads 2 .*; allowed for this model: 1, 2, 4"),
        ({}, 8, "num_attention_heads 4"),
        ({"intermediate_size": 98}, 4, "intermediate_size 98; allowed for this model: 1, 2$"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 96},
            2,
            "value_heads 3",
        ),
    ],
)
def test_a_split_that_does_not_divide_is_refused(
    changes: dict[str, Any], ranks: int, message: str, tmp_path: Path
) -> None:
    """With what does not divide, and what would, before any weight is read."""
    path = make_checkpoint(tmp_path / "model", "llama", **changes)
    (path / "model.safetensors").write_bytes(b"not to be read")
    with pytest.raises(ConfigError, match=message) as refusal:
        check_ranks(path, ranks)
    assert str(refusal.value).startswith(f"replica.tensor_parallel_size is {ranks}, which does not")


def test_experts_must_divide_too(tmp_path: Path) -> None:
    """Every rank has a part of every expert."""
    path = make_checkpoint(tmp_path / "model", "deepseek_v3", moe_intermediate_size=30)
    check_split(load_config(path), 2)
    with pytest.raises(ConfigError, match="moe_intermediate_size 30; allowed for this model: 1, 2"):
        check_split(load_config(path), 4)


def test_a_plan_of_an_unknown_style_is_refused(checkpoint: MakeCheckpoint) -> None:
    """A later transformers may split in ways that would be computed wrongly in silence."""
    config = load_config(checkpoint("llama"))
    config.base_model_tp_plan = {"layers.*.self_attn.q_proj": "zigzag"}
    with pytest.raises(ConfigError, match=r"splits layers\.\*\.self_attn\.q_proj .*'zigzag'"):
        Sharding(config, 0, 2)


def test_a_plan_may_name_the_embedding(checkpoint: MakeCheckpoint) -> None:
    """transformers 5.17 does where it is tied to the head; it is split as without."""
    config = load_config(checkpoint("llama-tied"))
    assert config.base_model_tp_plan is not None
    config.base_model_tp_plan = config.base_model_tp_plan | {"embed_tokens": "embedding_rowwise"}
    split = Sharding(config, 1, 2).split_of("model.embed_tokens.weight", (211, 64))
    assert split is not None
    assert (split.dim, split.first, split.last, split.length) == (0, 106, 211, 106)


@pytest.mark.parametrize(
    ("num_heads", "ranks", "expected"),
    [
        (4, 2, [(0, 2), (2, 4)]),
        (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (1, 3, [(0, 1), (0, 1), (0, 1)]),
    ],
)
def test_heads_are_on_the_ranks_whose_queries_need_them(
    num_heads: int, ranks: int, expected: list[tuple[int, int]]
) -> None:
    """Neighbouring ranks share where there are too few."""
    assert [heads_of_rank(num_heads, rank, ranks) for rank in range(ranks)] == expected


_MEASURE = """
import sys
from pathlib import Path
from typing import Any
import torch
from rillgate_server.worker.model_loader import load_config, load_network
from rillgate_server.worker.packed_linear import pack_linear_layers
from rillgate_server.worker.sharding import Sharding

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(l for l in lines if l.startswith("RssAnon")).split()[1]) * 1024

peak = 0

def sample(done, total):
    global peak
    peak = max(peak, anonymous_bytes())

def load(path):
    path = Path(path)
    sharding = Sharding(load_config(path), 1, 4)
    model = load_network(path, torch.bfloat16, sample, sharding)
    own_bytes = sum(p.nbytes for p in model.parameters())
    pack_linear_layers(model)
    sample(0, 0)
    return model, own_bytes

load(sys.argv[1])  # imports, pools
before, peak = anonymous_bytes(), 0
model, own_bytes = load(sys.argv[2])
print(peak - before, own_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_rank_never_holds_more_than_its_share_and_one_tensor(
    checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Peak anonymous memory of one of four ranks that load 200 MB, linear layers packed."""
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
    largest_tensor_bytes = 8000 * 1024 * 2
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(checkpoint("qwen2")), str(path)],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak_bytes, own_bytes = map(int, done.stdout.split())
    assert 0.24 * file_bytes < own_bytes < 0.27 * file_bytes
    assert 0.9 * own_bytes < peak_bytes < own_bytes + largest_tensor_bytes
