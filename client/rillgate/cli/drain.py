"""`rillgate drain`: takes a replica, or the whole server, out of service.

Owns that command's output.
"""

import argparse
import json

from rillgate.cli.arguments import UsageError, add_connection_flags, connect
from rillgate.cli.terminal import printable


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "drain",
        help="take a replica out of service",
        description="Take a replica, or the whole server, out of service: no new requests; running "
        "streams move to other replicas or finish. Ends when none is left (exit status 0) or the "
        "time is over (1).",
    )
    parser.add_argument(
        "replica", nargs="?", default="", metavar="REPLICA", help="its name in `rillgate status`"
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="how long to wait for running streams (default: the server's own grace)",
    )
    parser.add_argument("--undo", action="store_true", help="take the replica back into service")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_connection_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Drain, and say what still runs."""
    if args.undo and not args.replica:
        raise UsageError("--undo needs a REPLICA: a server's drain cannot be undone")
    with connect(args) as client:
        num_open = client.drain(args.replica, time_limit_s=args.time_limit, undo=args.undo)
    if args.json:
        print(json.dumps({"num_open_requests": num_open}))
    else:
        name = printable(args.replica) or "the server"
        print(f"{name} {'is back in service' if args.undo else 'is drained'}: {num_open} open")
    return 1 if num_open and not args.undo else 0
