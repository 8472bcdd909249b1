"""`python -m rillgate_server.cli COMMAND`: the server's commands without the client's."""

import argparse
import sys
from collections.abc import Sequence

from rillgate_server.cli.commands import add_commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (default: what the process was given); return the exit code."""
    parser = argparse.ArgumentParser(prog="rillgate", description="The server's commands.")
    add_commands(parser.add_subparsers(required=True, metavar="COMMAND"))
    args = parser.parse_args(arguments)
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
