"""The server's commands; wires everything."""

from rillgate_server.cli.commands import add_commands as add_commands
