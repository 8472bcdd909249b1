"""`rillgate status`: what the server and its replicas are doing.

Owns that command's output.
"""

import argparse
import dataclasses
import json
import sys
import time
from enum import Enum

from rillgate.cli.arguments import add_connection_flags, connect
from rillgate.cli.terminal import CLEAR_SCREEN, print_table
from rillgate.status_types import ReplicaStatus, ServerStatus


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
    """Show the status, once or until interrupted."""
    with connect(args) as client:
        while True:
            status = client.status()
            if args.json:
                print(json.dumps(_jsonable(status)), flush=True)
            else:
                if args.watch is not None and sys.stdout.isatty():
                    sys.stdout.write(CLEAR_SCREEN)
                _print(status)
            if args.watch is None:
                return 0
            try:
                time.sleep(max(0.05, args.watch))
            except KeyboardInterrupt:
                return 0


def _print(status: ServerStatus) -> None:
    print(
        f"rillgate {status.server_version}, up {status.uptime_s:.0f} s, "
        f"{status.num_open_requests} open, {status.num_running} running, "
        f"{status.num_waiting} waiting; cache blocks: {status.num_blocks_used} used, "
        f"{status.num_blocks_cached} cached, {status.num_blocks_free} free"
    )
    if not status.replicas:
        print("no replica is connected: it is loading, or it is being restarted")
        return
    headers = (
        "replica",
        "model",
        "state",
        "run",
        "wait",
        "used",
        "cached",
        "free",
        "tok/s in",
        "step ms",
        "hit %",
        "preempt",
    )
    print_table(headers, [_row(replica) for replica in status.replicas])


def _row(replica: ReplicaStatus) -> tuple[str, ...]:
    prompt = replica.num_prompt_tokens
    return (
        replica.replica_id,
        replica.model,
        replica.state.value,
        str(replica.num_running),
        str(replica.num_waiting),
        str(replica.device.num_blocks_used),
        str(replica.device.num_blocks_cached),
        str(replica.device.num_blocks_free),
        f"{replica.prefill_tokens_per_s:.0f}" if replica.prefill_tokens_per_s else "-",
        f"{replica.decode_step_ms:.1f}" if replica.decode_step_ms else "-",
        f"{100 * replica.num_cached_tokens / prompt:.0f}" if prompt else "-",
        str(replica.num_preemptions),
    )


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
