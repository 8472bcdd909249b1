"""What `model.quantization = auto` measures, and what it takes."""

import pytest
import torch

from rillgate_server.worker.memory_needs import memory_needs
from rillgate_server.worker.quantization import auto
from tests.support.worker_fixtures import MakeCheckpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2-windows", "deepseek_v3"])
def test_it_measures_networks_of_every_kind(kind: str, checkpoint: MakeCheckpoint) -> None:
    """And gives the numbers that it decided by."""
    choice = auto.choose(checkpoint(kind), "bfloat16", CPU)
    assert choice.quantization in ("none", "int8")
    for what in ("a decode step of 1 ", "of 16 ", "256 prompt tokens ", "MB of weights"):
        assert what in choice.why


@pytest.mark.parametrize(("factor", "expected"), [(0.5, "int8"), (0.96, "none"), (1.5, "none")])
def test_int8_is_taken_where_it_is_clearly_faster(
    factor: float, expected: str, checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the mean of what was measured."""
    exact = {"a decode step of 1": 0.01, "of 16": 0.02, "256 prompt tokens": 0.1}
    int8 = {what: factor * seconds for what, seconds in exact.items()}
    monkeypatch.setattr(auto, "_measure", lambda *_: (exact, int8))
    choice = auto.choose(checkpoint("llama"), "auto", CPU)
    assert choice.quantization == expected
    assert f"{factor:.2f} of the time" in choice.why


def test_what_does_not_fit_is_not_measured(
    checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INT8 where the exact weights do not fit, NF4 where INT8 does not, either."""
    path = checkpoint("llama")
    needs = {it.method: it.peak_bytes for it in memory_needs(path).weights}
    for free, expected in ((needs["none"] - 1, "int8"), (needs["int8"] - 1, "bnb-nf4")):
        monkeypatch.setattr(auto, "free_bytes", lambda _device, free=free: free)
        choice = auto.choose(path, "auto", CPU)
        assert choice.quantization == expected
        assert "fit" in choice.why
