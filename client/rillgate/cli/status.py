"""`rillgate status`: what the server and its replicas are doing.

Owns that command's flags and its JSON; a replica's tables are `status_tables`'.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from enum import Enum

from rillgate.cli.arguments import add_connection_flags, connect
from rillgate.cli.status_tables import print_replica
from rillgate.cli.terminal import CLEAR_SCREEN, printable
from rillgate.status_types import ServerStatus
from rillgate.sync_client import Client


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser("status", help="show what the server is doing")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=1.0,
        metavar="SECONDS",
        help="show it again and again (every second), until Ctrl-C",
    )
    add_connection_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show the status, once or until interrupted, which is then the ordinary end."""
    with connect(args) as client:
        if args.watch is None:
            _show(client, args)
            return 0
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                _show(client, args)
                time.sleep(max(0.05, args.watch))
    return 0


def _show(client: Client, args: argparse.Namespace) -> None:
    status = client.status()
    if args.json:
        print(json.dumps(_jsonable(status)), flush=True)
        return
    if args.watch is not None and sys.stdout.isatty():
        sys.stdout.write(CLEAR_SCREEN)
    _print(status)


def _print(status: ServerStatus) -> None:
    print(
        f"rillgate {status.server_version}, up {status.uptime_s:.0f} s, "
        f"{status.num_open_requests} open, {status.num_running} running, "
        f"{status.num_waiting} waiting"
    )
    if status.routing_policy:
        print(
            f"routing {printable(status.routing_policy)}; {status.num_moved_streams} streams "
            f"moved, {status.num_waiting_streams} wait for a replica"
        )
    if not status.replicas:
        print("no replica is connected: it is loading, or it is being restarted")
    for replica in status.replicas:
        print()
        print_replica(replica)


def _jsonable(status: ServerStatus) -> dict[str, object]:
    """Turn the status into what JSON can say, with the sums over replicas."""

    def plain(items: list[tuple[str, object]]) -> dict[str, object]:
        return {name: value.value if isinstance(value, Enum) else value for name, value in items}

    return {
        **dataclasses.asdict(status, dict_factory=plain),
        "num_running": status.num_running,
        "num_waiting": status.num_waiting,
        "num_blocks": status.num_blocks,
        "num_blocks_free": status.num_blocks_free,
        "num_blocks_used": status.num_blocks_used,
        "num_blocks_cached": status.num_blocks_cached,
        "num_preemptions": status.num_preemptions,
    }
