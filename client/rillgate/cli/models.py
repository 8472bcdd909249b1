"""`rillgate models`: what the server answers for.

Owns that command's output.
"""

import argparse
import dataclasses
import json

from rillgate.cli.arguments import add_connection_flags, connect
from rillgate.cli.terminal import print_table


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser("models", help="list the server's models")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_connection_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """List the models."""
    with connect(args) as client:
        models = client.models()
    if args.json:
        print(json.dumps([dataclasses.asdict(model) for model in models]))
        return 0
    print_table(
        ("model", "version", "context", "vocabulary", "chat template"),
        [
            (
                model.name,
                model.version[:16],
                str(model.max_context_tokens),
                str(model.vocab_size),
                "yes" if model.has_chat_template else "no",
            )
            for model in models
        ],
    )
    return 0
