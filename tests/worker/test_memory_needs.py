"""What a checkpoint takes, worked out before loading, is what loading it takes."""

from pathlib import Path

import pytest

from rillgate_server.config.groups import QUANTIZATIONS
from rillgate_server.core.quantization import Quantization
from rillgate_server.errors import ConfigError
from rillgate_server.worker.memory_needs import memory_needs, run_inspect
from rillgate_server.worker.quantization.command import run_quantize
from rillgate_server.worker.worker import Worker, WorkerOptions
from tests.support.checkpoints import KINDS
from tests.support.worker_fixtures import MakeCheckpoint

CACHE_BLOCK_TOKENS = 16


@pytest.mark.parametrize("kind", list(KINDS))
def test_it_is_what_loading_takes(kind: str, checkpoint: MakeCheckpoint) -> None:
    """Weights within a hundredth in every way to hold them, and the cache to the byte."""
    path = checkpoint(kind)
    needs = memory_needs(path)
    assert [it.method for it in needs.weights] == list(QUANTIZATIONS)
    for need in needs.weights:
        assert need.num_bytes <= need.peak_bytes
        for kv_dtype in ("auto", "int8"):
            options = WorkerOptions(
                quantization=need.method, kv_dtype=kv_dtype, block_size_tokens=CACHE_BLOCK_TOKENS
            )
            worker = Worker.load(path, options)
            assert need.num_bytes == pytest.approx(worker.weights.model, rel=0.01)
            of_token = needs.cache_bytes_per_token[worker.layout.kv_dtype]
            assert of_token * CACHE_BLOCK_TOKENS == worker.layout.block_bytes


def test_ranks_take_their_parts(checkpoint: MakeCheckpoint) -> None:
    """Half of what is split, all of the norms; a split that does not divide is refused."""
    whole, half = (memory_needs(checkpoint("qwen2"), ranks) for ranks in (1, 2))
    assert half.num_parameters == whole.num_parameters
    for of_all, of_one in zip(whole.weights, half.weights, strict=True):
        assert 0.5 * of_all.num_bytes < of_one.num_bytes < 0.55 * of_all.num_bytes
    for ranks in (0, 3):
        with pytest.raises(ConfigError, match=str(ranks)):
            memory_needs(checkpoint("qwen2"), ranks)


def test_it_is_printed_also_of_a_quantised_checkpoint(
    checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which can be held in one way alone."""
    assert run_quantize(checkpoint("llama"), tmp_path / "int8", Quantization("int8")) == 0
    assert run_inspect(tmp_path / "int8", 1) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM" in printed
    assert "int8 (as stored)" in printed
    assert "none" not in printed
    assert memory_needs(tmp_path / "int8").weights[0].num_bytes == (
        memory_needs(checkpoint("llama")).weights[1].num_bytes
    )
