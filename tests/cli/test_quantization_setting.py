"""`model.quantization = auto` is settled before anything starts."""

from pathlib import Path

import pytest

from rillgate_server.cli.quantization_setting import settle_quantization
from rillgate_server.config.groups import ModelConfig
from rillgate_server.config.settings import Settings, bundled_model_dir
from rillgate_server.core.quantization import Quantization
from rillgate_server.errors import ConfigError
from rillgate_server.worker.quantization.command import run_quantize


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_it_is_measured_once_and_said(capfd: pytest.CaptureFixture[str]) -> None:
    """By a process of its own, the first time; with the reason, each time."""
    settings = Settings(model=ModelConfig(quantization="auto"))
    found = [settle_quantization(settings, bundled_model_dir()) for _ in range(2)]
    assert found[0].model.quantization == found[1].model.quantization
    assert found[0].model.quantization in ("none", "int8")
    said = capfd.readouterr().err
    assert said.count("auto: measuring") == 1
    assert said.count("of the time of the exact weights") == 2


def test_a_named_method_and_a_stored_one_are_not_measured(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that is stored quantised decides by itself."""
    named = Settings(model=ModelConfig(quantization="int8"))
    assert settle_quantization(named, bundled_model_dir()) is named
    assert run_quantize(bundled_model_dir(), tmp_path / "int8", Quantization("int8")) == 0
    settings = Settings(model=ModelConfig(quantization="auto"))
    assert settle_quantization(settings, tmp_path / "int8").model.quantization == "none"
    assert "auto" not in capfd.readouterr().err


def test_layers_cannot_be_named_with_auto() -> None:
    """Which method they would be for is not known."""
    with pytest.raises(ConfigError, match=r"model.quantization is auto"):
        ModelConfig(quantization="auto", quantization_exclude=("*.down_proj",))
