"""The server's commands: flags become settings, and what the operator can mend is one line."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rillgate.cli.main import main as client_main
from rillgate_server.cli.__main__ import main
from rillgate_server.cli.commands import EXIT_OPERATOR, add_commands, settings_of
from rillgate_server.cli.model_source import resolve_model
from rillgate_server.config.groups import ModelConfig
from rillgate_server.config.settings import bundled_model_dir
from rillgate_server.errors import CheckpointError
from tests.support.checkpoints import make_checkpoint


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait for the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("serve", "--listen", "nowhere"), "gateway.listen is 'nowhere'; allowed: HOST:PORT"),
        (("serve", "--set", "batcher.max_running=0"), "batcher.max_running is 0; allowed: 1 to"),
        (("serve", "--set", "batcher.max_runing=1"), "batcher.max_runing is no setting; allowed"),
        (("serve", "--set", "max_running"), "--set is 'max_running'; allowed: GROUP.FIELD=VALUE"),
        (("serve", "--config", "/nothing.toml"), "/nothing.toml cannot be read"),
        (("serve", "--model", "/nothing/here"), "model.path is '/nothing/here'; allowed: a ch"),
        (("serve", "--model", "nobody/nothing"), "'nobody/nothing' is no directory here, and the"),
        (("replica",), "replica.socket and replica.listen are empty; allowed: a path"),
        (("replica", "--listen", "x:1"), "replica.listen is 'x:1' and nothing keeps strangers out"),
        (("gateway",), "gateway.replica_addresses is empty; allowed: at least one (--replica-a"),
        (("serve", "--replicas", "-1"), "serve.num_replicas is -1; allowed: 0 to 256"),
        (("serve", "--replicas", "0"), "serve.num_replicas is 0 and gateway.replica_addresses is"),
        (("serve", "--tensor-parallel", "x"), "replica.tensor_parallel_size is 'x'; allowed"),
        (("serve", "--devices", "gpu"), "serve.devices is 'gpu'; allowed: auto, cpu, or each at"),
    ],
    ids=lambda it: " ".join(it)[:40] if isinstance(it, tuple) else None,
)
def test_what_the_operator_can_mend_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback; field, value and what is allowed."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert says in said
    assert len(said.splitlines()) == 1


def test_without_a_writable_directory_the_settings_that_help_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A read-only container without /tmp: one line, no traceback."""
    monkeypatch.setattr("tempfile.tempdir", "/nothing/here")
    assert main(("serve",)) == 2
    said = capsys.readouterr().err
    assert "replica.socket" in said
    assert "TMPDIR" in said
    assert len(said.splitlines()) == 1


def test_a_checkpoint_without_a_file_is_named_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The directory and the file that it lacks."""
    assert main(("serve", "--model", str(tmp_path))) == 2
    assert f"{tmp_path} has no config.json" in capsys.readouterr().err


def test_flags_become_settings_and_a_repeated_one_a_list() -> None:
    """The addresses keep their order; a list in the file or the environment gives way to them."""
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    flags = ("--replicas", "3", "--tensor-parallel", "2", "--routing-policy", "round-robin")
    addresses = ("--replica-address", "b:1", "--replica-address", "unix:/a, b.sock")
    args = parser.parse_args(["serve", *flags, *addresses, "--devices", "cpu"])
    settings = settings_of(args)
    assert (settings.serve.num_replicas, settings.serve.devices) == (3, "cpu")
    assert settings.replica.tensor_parallel_size == 2
    assert settings.gateway.routing_policy == "round-robin"
    assert settings.gateway.replica_addresses == ("b:1", "unix:/a, b.sock")


def test_help_shows_the_commands() -> None:
    """People see serve, replica and gateway. Run as a process, as people do."""
    text = subprocess.run(
        [sys.executable, "-m", "rillgate_server.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    for command in ("serve", "replica", "gateway"):
        assert re.search(rf"^ +{command} +start", text, re.MULTILINE)


def test_serve_help_names_the_ways_to_set_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    """Flags, environment, file."""
    with pytest.raises(SystemExit):
        main(("serve", "--help"))
    text = capsys.readouterr().out
    for part in ("--listen", "--model", "--config", "RILLGATE_GROUP__FIELD", "--set"):
        assert part in text


def test_commands_fit_under_another_parser() -> None:
    """The base package's command takes them in by their entry point."""
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    args = parser.parse_args(
        ["serve", "--listen", "0.0.0.0:7", "--set", "cache.device_memory=5GiB"]
    )
    assert callable(args.run)
    assert args.listen == "0.0.0.0:7"


def test_no_model_means_the_bundled_one() -> None:
    """It is served by its directory's name."""
    assert resolve_model(ModelConfig()) == (bundled_model_dir(), "demo")


def test_a_directory_is_served_under_its_name_or_the_one_given(tmp_path: Path) -> None:
    """A trailing slash or a relative path changes nothing."""
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert resolve_model(ModelConfig(path=f"{folder}/")) == (folder, "my-model")
    assert resolve_model(ModelConfig(path=str(folder), name="r1")) == (folder, "r1")


def test_a_hub_id_without_a_network_is_a_clear_error() -> None:
    """It says that it is no directory, and what the hub's library said."""
    with pytest.raises(CheckpointError, match=r"no directory here, and the hub did not give it"):
        resolve_model(ModelConfig(path="nobody/nothing"))


def test_a_checkpoint_is_quantised_below_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the client's own command of that name; a directory with something in it is refused."""
    source = make_checkpoint(tmp_path / "model", "llama")
    arguments = ["models", "quantize", str(source), str(tmp_path / "out"), "--include", "head"]
    assert client_main(arguments) == 0
    assert "MB of weights in int8, before" in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").is_file()
    assert main(arguments) == EXIT_OPERATOR
    assert "out is not empty; allowed: a directory that is new or empty" in capsys.readouterr().err
