"""`rillgate flush-cache`: makes the server forget what it has cached.

Owns that command's output.
"""

import argparse
import dataclasses
import json

from rillgate.cli.arguments import add_connection_flags, connect


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "flush-cache",
        help="forget cached prompts",
        description="Make every replica forget the cached blocks that no request uses, in both "
        "tiers. Running requests keep what they have; later prompts are computed again.",
    )
    parser.add_argument("--model", default="", help="only this one of `rillgate models`")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_connection_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Flush, and say what was dropped."""
    with connect(args) as client:
        flushed = client.flush_cache(model=args.model)
    if args.json:
        print(json.dumps(dataclasses.asdict(flushed)))
        return 0
    print(
        f"dropped {flushed.num_device_blocks} device blocks and {flushed.num_host_blocks} host "
        f"blocks of {flushed.num_replicas} replica{'' if flushed.num_replicas == 1 else 's'}"
    )
    return 0
