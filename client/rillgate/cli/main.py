"""The entry of the command `rillgate`: parser, errors as one line, exit codes.

Owns which commands there are. The server's own come in through the entry points `rillgate.commands`
(each a function that takes argparse's subparsers); where the server is not installed, they say what
to install. Exit codes: 0 done, 1 the call failed, 2 wrong usage, 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import TypeAlias

from rillgate.cli import bench, chat, drain, flush_cache, generate, models, status
from rillgate.cli.arguments import UsageError
from rillgate.errors import RillgateError, UnavailableError

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_CLIENT_COMMANDS: dict[str, Callable[[Subparsers], None]] = {
    "generate": generate.add_command,
    "chat": chat.add_command,
    "status": status.add_command,
    "models": models.add_command,
    "flush-cache": flush_cache.add_command,
    "drain": drain.add_command,
    "bench": bench.add_command,
}
# What the server adds where it is installed: name -> help.
_SERVER_COMMANDS = {
    "serve": "start a server: one gateway and one replica",
    "replica": "start one replica by itself",
    "evaluate": "measure how well a model answers, for any setting",
}


def main(
    arguments: Sequence[str] | None = None, installed: Iterable[EntryPoint] | None = None
) -> int:
    """Run one command; return the exit status.

    `installed`: where the server's commands come from; None: the entry points that are installed.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(given, installed)
    if not given:
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(given)
    try:
        status_code: int | None = args.run(args)
        sys.stdout.flush()
    except UsageError as error:
        return _complain(str(error), 2)
    except RillgateError as error:
        return _complain(_describe(error, args), 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader went away (`rillgate generate … | head`): what is buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status_code or 0


def _parser(
    given: Sequence[str], installed: Iterable[EntryPoint] | None
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rillgate",
        description="Serves language models over gRPC, and calls them.",
        epilog="The server's address comes from --target or RILLGATE_TARGET.",
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in _CLIENT_COMMANDS.values():
        add_command(subparsers)
    # The server's commands take longer to import than most client commands take to run.
    is_below_models = given[:1] == ["models"] and given[1:2] and not given[1].startswith("-")
    if not given or given[0] not in _CLIENT_COMMANDS or is_below_models:
        found = entry_points(group="rillgate.commands") if installed is None else installed
        _add_server_commands(subparsers, found)
    return parser


def _add_server_commands(subparsers: Subparsers, found: Iterable[EntryPoint]) -> None:
    why = "it is not installed"
    for entry_point in found:
        try:
            entry_point.load()(subparsers)
        except ImportError as error:
            why = str(error)
    for name, help_text in _SERVER_COMMANDS.items():
        if name not in subparsers.choices:
            # Takes any flags without knowing them: nothing begins with this prefix.
            placeholder = subparsers.add_parser(
                name, help=help_text, add_help=False, prefix_chars="\0"
            )
            placeholder.add_argument("rest", nargs="*")
            placeholder.set_defaults(run=_Missing(name, why))


class _Missing:
    """Stands for a command whose packages are not installed."""

    def __init__(self, name: str, why: str) -> None:
        self._name = name
        self._why = why

    def __call__(self, args: argparse.Namespace) -> int:
        raise UsageError(
            f"`rillgate {self._name}` needs the server: pip install 'rillgate[server]' "
            f"({self._why})"
        )


def _describe(error: RillgateError, args: argparse.Namespace) -> str:
    text = f"{error.message} (request {error.request_id})" if error.request_id else error.message
    if isinstance(error, UnavailableError) and error.retry_after_s is None:
        return f"no answer from {getattr(args, 'target', 'the server')}: {text}"
    return text


def _complain(message: str, status_code: int) -> int:
    sys.stdout.flush()
    print("rillgate:", " ".join(message.split()), file=sys.stderr)
    return status_code
