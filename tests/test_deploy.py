"""What `deploy/` offers fits the commands and settings of this version."""

import argparse
import configparser
import shlex
from pathlib import Path

from rillgate_server.cli import add_commands
from rillgate_server.config.settings import load_settings

DEPLOY = Path(__file__).parents[1] / "deploy"


def test_the_sample_settings_load() -> None:
    """Every name is a setting, and every value is in its range."""
    settings = load_settings(DEPLOY / "rillgate.toml")
    assert settings.gateway.listen == "0.0.0.0:50051"


def test_the_unit_starts_a_command_that_exists_and_waits_for_the_drain() -> None:
    """Its arguments parse, and systemd kills no sooner than both processes have drained."""
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign] # names keep their case
    unit.read(DEPLOY / "rillgate.service")
    service = unit["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(dest="command"))
    assert Path(program).name == "rillgate"
    assert parser.parse_args(arguments).config == Path("/etc/rillgate/rillgate.toml")
    settings = load_settings(DEPLOY / "rillgate.toml")
    drains_s = settings.gateway.drain_grace_s + settings.replica.drain_grace_s
    assert int(service["TimeoutStopSec"]) > drains_s
