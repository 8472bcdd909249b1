"""The command `rillgate`: what needs no server installed, and a door for the server's commands."""

from rillgate.cli.main import main as main
