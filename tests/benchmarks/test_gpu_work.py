"""What steps read and compute, beside numbers by hand and a network's own; and what rows make of
it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks.gpu.engine_alone import EngineRun, StepNote
from benchmarks.gpu.rows import distribution_ms, find, percentile
from benchmarks.gpu.scale import FULL, QWEN_05B, QWEN_7B, TINY, Shape
from benchmarks.gpu.weights import make_checkpoint, shards_of
from benchmarks.gpu.work import (
    Work,
    cache_bytes_per_token,
    decode_work,
    head_elements,
    matrix_elements,
    num_channels,
    prefill_work,
    vector_elements,
    weight_bytes,
)

SHAPES = pytest.mark.parametrize("shape", [TINY.large, TINY.small], ids=lambda it: it.name)


def test_shapes_have_the_parameters_that_their_networks_are_known_for() -> None:
    """Qwen2.5-7B has 7,615,616,512; 0.5B, whose head is its embedding, 494,032,768."""
    large = matrix_elements(QWEN_7B) + 2 * head_elements(QWEN_7B) + vector_elements(QWEN_7B)
    assert large == 7_615_616_512
    small = matrix_elements(QWEN_05B) + head_elements(QWEN_05B) + vector_elements(QWEN_05B)
    assert small == 494_032_768


@SHAPES
def test_elements_are_those_of_the_network_that_transformers_builds(shape: Shape) -> None:
    """Counted over its parameters, by what they are."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(Qwen2Config(**shape.config(64)))
    linear = {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    in_layers = [m for n, m in linear.items() if n != "lm_head"]
    assert matrix_elements(shape) == sum(m.weight.numel() for m in in_layers)
    assert num_channels(shape) == sum(m.out_features for m in in_layers)
    assert head_elements(shape) == linear["lm_head"].weight.numel()
    vectors = [p for p in network.parameters() if p.dim() == 1]
    assert vector_elements(shape) == sum(p.numel() for p in vectors)


def test_decode_step_of_7b_reads_and_computes_what_it_does_by_hand() -> None:
    """64 rows of 1,024 tokens: 14.1 GB of weights and 3.8 of cache; 931 billion operations."""
    assert weight_bytes(QWEN_7B) == 14_141_238_272
    assert cache_bytes_per_token(QWEN_7B) == 28 * 2 * 4 * 128 * 2 == 57_344
    work = decode_work(QWEN_7B, 64, 64 * 1024)
    assert work.read_bytes == 14_141_238_272 + 3_758_096_384
    assert work.operations == 904_996_585_472 + 4 * 28 * 28 * 128 * 65_536


def test_int8_halves_the_layers_alone() -> None:
    """A byte per weight, four per channel; head, norms and biases stay."""
    channels = 28 * (3 * 3584 + 2 * 512 + 2 * 18944)
    saved = matrix_elements(QWEN_7B) - 4 * channels
    assert weight_bytes(QWEN_7B) - weight_bytes(QWEN_7B, "int8") == saved


def test_prefill_computes_each_pair_of_tokens_once() -> None:
    """Against a sum over the tokens, each of which attends to itself and those before it."""
    shape, length = TINY.large, 40
    pairs = sum(position + 1 for position in range(length))
    per_pair = 2 * (shape.num_heads * shape.head_dim) * 2 * shape.num_layers
    products = 2 * matrix_elements(shape) * length + 2 * head_elements(shape)
    assert prefill_work(shape, 3, length).operations == 3 * (products + per_pair * pairs)


def test_limit_is_the_slower_of_reading_and_computing() -> None:
    """Both overlap, so the larger time counts."""
    work = Work(read_bytes=100.0, operations=1000.0)
    assert work.seconds(10.0, 1000.0) == 10.0
    assert work.seconds(1000.0, 10.0) == 100.0


def test_full_scale_fits_its_own_settings() -> None:
    """No request is longer than the served context, and all of them run at once."""
    longest = max(
        FULL.context_tokens + max(FULL.decode_tokens) + 100,
        FULL.prefill_tokens + 2,
        FULL.request_prompt_tokens + FULL.request_output_tokens,
    )
    assert longest <= FULL.max_context_tokens
    assert FULL.settings()["batcher"]["max_running"] == "256"


def _note(end_s: float, num_choices: int, least_offset: int, num_tokens: int = 4) -> StepNote:
    return StepNote(end_s, num_tokens, num_choices, least_offset, 100, None)


def test_steady_steps_are_those_in_which_all_rows_decode() -> None:
    """Not where somebody has a first token, or has none, or the batch is not whole any more."""
    notes = (_note(1, 2, 0, 2), _note(2, 4, 0), _note(3, 4, 1), _note(4, 4, 2), _note(5, 3, 3, 3))
    run = EngineRun(0.5, notes)
    assert [note.end_s for note in run.steady(4)] == [3, 4]
    assert run.num_tokens == 2 + 4 + 4 + 4 + 3
    assert run.seconds == 4.5


def test_percentiles_are_values_that_were_measured() -> None:
    """Nearest rank: the value that so many percent do not exceed."""
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, it) for it in (1, 50, 95, 99, 100)] == [1, 50, 95, 99, 100]
    assert percentile([7.0], 50) == 7.0
    assert distribution_ms([0.001, 0.003]) == {
        "p50": 1.0,
        "p90": 3.0,
        "p95": 3.0,
        "p99": 3.0,
        "max": 3.0,
    }


def test_last_row_of_a_kind_is_found() -> None:
    """Where a part was asked twice, the newer one counts."""
    rows = [{"part": "a", "n": 1}, {"part": "b", "n": 1}, {"part": "a", "n": 2}]
    assert find(rows, "a") == {"part": "a", "n": 2}
    assert find(rows, "a", n=1) == {"part": "a", "n": 1}
    assert find(rows, "a", n=3) is None


def test_shards_hold_every_tensor_once_and_are_not_much_larger_than_asked() -> None:
    """One tensor that is too large has a shard of its own."""
    tensors = {"a": (10,), "b": (10,), "c": (100,), "d": (10,), "e": (4,)}
    shards = shards_of(tensors, 40)  # bf16: two bytes each
    assert [list(shard) for shard in shards] == [["a", "b"], ["c"], ["d", "e"]]


@SHAPES
def test_checkpoint_loads_whole_and_is_made_once(shape: Shape, tmp_path: Path) -> None:
    """transformers finds each tensor in it, with the spread that was asked for."""
    directory = make_checkpoint(tmp_path / shape.name, shape, 128)
    made = (directory / "complete").stat().st_mtime_ns
    assert make_checkpoint(directory, shape, 128) == directory
    assert (directory / "complete").stat().st_mtime_ns == made
    network, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert network.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(network.model.norm.weight, torch.ones_like(network.model.norm.weight))
    config = json.loads((directory / "config.json").read_text())
    assert config["tie_word_embeddings"] is shape.is_tied
