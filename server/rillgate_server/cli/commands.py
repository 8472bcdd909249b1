"""The commands `serve`, `replica`, `gateway` and `evaluate`.

Owns the flags and the exit codes. What a command runs is imported when it is chosen: the gateway
must never load torch, and `--help` should not wait for anything.

Exit codes: 0 stopped as asked, 2 the operator can mend it (said in one line), 1 a bug or a crash.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

from rillgate_server.cli.model_commands import add_model_commands
from rillgate_server.cli.model_source import resolve_model
from rillgate_server.cli.quantization_setting import settle_quantization
from rillgate_server.config.groups import AUTO_QUANTIZATION, QUANTIZATIONS, ROUTING_POLICIES
from rillgate_server.config.settings import Settings, load_settings
from rillgate_server.core.checkpoint import read_model_spec
from rillgate_server.errors import ConfigError, RillgateError
from rillgate_server.worker.allocator import use_one_heap

EXIT_OPERATOR = 2

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


@dataclass(frozen=True, slots=True)
class _Command:
    """A command, and the function `(settings, model_dir) -> exit code` that it runs."""

    module: str
    function: str
    needs_addresses: bool = False
    ray_module: str = ""
    """Which has the function for serve.cluster = ray."""
    computes: bool = False
    """In this process."""
    takes_flags: bool = False
    """As its third argument: it has some that are no settings."""

    def __call__(self, args: argparse.Namespace) -> int:
        """Read the settings, find the model, run."""
        try:
            settings, model_dir = _prepare(args)
            settings = settle_quantization(settings, model_dir)
            if self.needs_addresses and not settings.gateway.replica_addresses:
                raise ConfigError(
                    "gateway.replica_addresses is empty; allowed: at least one "
                    "(--replica-address ADDRESS)"
                )
            if self.computes:
                use_one_heap()
            run: Callable[..., int] = getattr(self._import(settings), self.function)
            return run(settings, model_dir, *([args] if self.takes_flags else []))
        except RillgateError as error:
            print(f"rillgate: {error}", file=sys.stderr, flush=True)
            return EXIT_OPERATOR
        except KeyboardInterrupt:
            return 130

    def _import(self, settings: Settings) -> ModuleType:
        if not self.ray_module or settings.serve.cluster != "ray":
            return importlib.import_module(self.module)
        try:
            return importlib.import_module(self.ray_module)
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise ConfigError(
                "serve.cluster is ray, and the package ray is not installed; allowed: local, or "
                "`pip install 'rillgate[server,ray]'`"
            ) from error


def add_commands(subparsers: Subparsers) -> None:
    """Add the server's commands to a parser's subcommands."""
    serve = subparsers.add_parser(
        "serve",
        help="start a server: a gateway and its replicas",
        description="Serves a model over gRPC until SIGTERM or Ctrl-C. Without flags: the bundled "
        "model on 127.0.0.1:50051.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_listen(serve)
    _add_replicas(serve)
    _add_routing(serve)
    _add_model(serve)
    _add_common(serve)
    serve.set_defaults(
        run=_Command(
            "rillgate_server.replica.serve",
            "run_serve",
            ray_module="rillgate_server.replica.ray_serve",
        )
    )
    replica = subparsers.add_parser(
        "replica",
        help="start one replica by itself",
        description="Runs a model behind a Unix socket or a TCP port that gateways connect to, or "
        "one rank of a model that is split over several processes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_doors(replica)
    _add_ranks(replica)
    _add_model(replica)
    _add_common(replica)
    replica.set_defaults(
        run=_Command("rillgate_server.replica.process", "run_replica", computes=True)
    )
    gateway = subparsers.add_parser(
        "gateway",
        help="start a gateway by itself, over replicas that run elsewhere",
        description="Runs the public services over replicas that others start. Needs the "
        "checkpoint's tokenizer, not its weights.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_listen(gateway)
    _add_routing(gateway)
    _add_model(gateway)
    _add_common(gateway)
    gateway.set_defaults(
        run=_Command("rillgate_server.gateway.process", "run_gateway", needs_addresses=True)
    )
    _add_evaluate(subparsers)
    add_model_commands(subparsers)


def _add_evaluate(subparsers: Subparsers) -> None:
    evaluate = subparsers.add_parser(
        "evaluate",
        help="measure how well a model answers, for any setting",
        description="Asks a model tasks with one right answer each (exact match) and measures its "
        "perplexity over a text, in this process, and prints a table. Without flags: the bundled "
        "model's held-out tasks.",
        epilog=_EVALUATE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_evaluation(evaluate)
    _add_model(evaluate)
    evaluate.add_argument(
        "--kv-dtype", choices=("auto", "int8"), help="of cached keys and values (auto)"
    )
    evaluate.add_argument(
        "--tensor-parallel", metavar="K", help="processes that the model is split over (1)"
    )
    _add_common(evaluate)
    evaluate.set_defaults(
        run=_Command(
            "rillgate_server.cli.evaluate.command", "run_evaluate", computes=True, takes_flags=True
        )
    )


_EPILOG = """settings, the later winning:
  FILE ([group] field = value)  <  RILLGATE_GROUP__FIELD  <  flags
  groups: model, batcher, cache, gateway, replica, link, serve, log (docs/configuration.md)

examples:
  rillgate serve
  rillgate serve --listen 0.0.0.0:50051 --model ~/models/DeepSeek-R1-Distill-Qwen-1.5B
  rillgate serve --replicas 4 --tensor-parallel 2
  rillgate gateway --replica-address 10.0.0.5:50061 --replica-address 10.0.0.6:50061
  rillgate serve --set batcher.max_running=128 --set cache.device_memory=8GiB"""


_EVALUATE_EPILOG = """examples:
  rillgate evaluate --compare none,float32,int8,int8-cache,int8+int8-cache
  rillgate evaluate --model DIR --text FILE --quantization int8
  rillgate evaluate --model DIR --tasks FILE --num-tasks 100 --json OUT

a line of a task file (docs/quantization.md):
  {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4", "kind": "sums"}"""


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compare",
        metavar="ROWS",
        help="settings to compare, rows by commas, each of words joined by +: "
        f"{', '.join(QUANTIZATIONS)}, bfloat16, float32, int8-cache",
    )
    parser.add_argument(
        "--tasks",
        metavar="FILE",
        type=Path,
        help="JSON lines (held_out_tasks.jsonl of the model's directory, if it has one)",
    )
    parser.add_argument(
        "--num-tasks", metavar="N", type=int, help="ask N, spread evenly over the file (all)"
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, default=1024, help="most tokens of an answer (1024)"
    )
    parser.add_argument("--text", metavar="FILE", type=Path, help="measure perplexity over a text")
    parser.add_argument("--json", metavar="OUT", type=Path, help="write the rows to a file, too")


def _add_listen(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help="where callers connect (127.0.0.1:50051); port 0 takes a free one",
    )


def _add_doors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--socket", metavar="PATH", help="the replica's Unix socket")
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        dest="replica_listen",
        help="where gateways on other machines connect; needs link.tls_*, link.token or --insecure",
    )
    parser.add_argument(
        "--insecure",
        action="store_const",
        const="true",
        help="let whoever can connect use the replica",
    )


def _add_replicas(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--replicas",
        metavar="N",
        help="copies of the model side by side (1); 0: only those of --replica-address",
    )
    parser.add_argument(
        "--tensor-parallel", metavar="K", help="processes that each replica is split over (1)"
    )
    parser.add_argument(
        "--devices",
        metavar="NAMES",
        help="cuda:0,cuda:1,… or cpu (auto: all CUDA devices, or the CPU)",
    )
    parser.add_argument(
        "--cluster",
        choices=("local", "ray"),
        help="start replicas on this machine (local) or on any of a Ray cluster",
    )
    parser.add_argument(
        "--ray-address", metavar="HOST:PORT", help="the cluster (auto: this machine's)"
    )


def _add_routing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--replica-address",
        metavar="ADDRESS",
        action="append",
        help="host:port, unix:PATH or file:PATH of replicas that run elsewhere; may be repeated",
    )
    parser.add_argument(
        "--routing-policy", choices=ROUTING_POLICIES, help="who gets a request (prefix)"
    )


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", metavar="R", help="which rank this is, 0 (the door) to K - 1")
    parser.add_argument(
        "--ranks",
        metavar="K",
        help="processes that the model is split over (1); torchrun's environment works, too",
    )
    parser.add_argument(
        "--rendezvous",
        metavar="HOST:PORT",
        help="where the ranks meet: a free port on rank 0's machine, in a private network",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="a checkpoint's directory, or a hub id such as owner/name (the bundled model)",
    )
    parser.add_argument("--model-name", metavar="NAME", help="what callers ask for (DIR's name)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        help="of weights and computation (auto: the checkpoint's own)",
    )
    parser.add_argument(
        "--quantization",
        choices=(*QUANTIZATIONS, AUTO_QUANTIZATION),
        help="of the layers' weights (none)",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings in TOML")
    parser.add_argument(
        "--set",
        metavar="GROUP.FIELD=VALUE",
        action="append",
        default=[],
        dest="assignments",
        help="any other setting; may be repeated",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="write a line per call to stderr (log.level=info)"
    )


_FLAGS = {
    # flag's attribute -> (group, field)
    "listen": ("gateway", "listen"),
    "socket": ("replica", "socket"),
    "replica_listen": ("replica", "listen"),
    "insecure": ("link", "insecure"),
    "replicas": ("serve", "num_replicas"),
    "tensor_parallel": ("replica", "tensor_parallel_size"),
    "devices": ("serve", "devices"),
    "cluster": ("serve", "cluster"),
    "ray_address": ("serve", "ray_address"),
    "replica_address": ("gateway", "replica_addresses"),
    "routing_policy": ("gateway", "routing_policy"),
    "rank": ("replica", "rank"),
    "ranks": ("replica", "tensor_parallel_size"),
    "rendezvous": ("replica", "rendezvous"),
    "model": ("model", "path"),
    "model_name": ("model", "name"),
    "dtype": ("model", "dtype"),
    "quantization": ("model", "quantization"),
    "kv_dtype": ("cache", "kv_dtype"),
}


def _prepare(args: argparse.Namespace) -> tuple[Settings, Path]:
    """Read the settings and find the checkpoint, which must be whole."""
    settings = settings_of(args)
    model_dir, name = resolve_model(settings.model)
    read_model_spec(model_dir, name, needs_tokenizer=True)
    model = replace(settings.model, path=str(model_dir), name=name)
    return settings.model_copy(update={"model": model}), model_dir


def settings_of(args: argparse.Namespace) -> Settings:
    """Read all sources, the flags of a parsed command line among them."""
    return load_settings(args.config, _overrides(args))


def _overrides(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Turn flags into group -> field -> text."""
    found: dict[str, dict[str, str]] = {}
    for assignment in args.assignments:
        path, equals, value = assignment.partition("=")
        group, dot, field = path.partition(".")
        if not (equals and dot):
            raise ConfigError(f"--set is {assignment!r}; allowed: GROUP.FIELD=VALUE")
        found.setdefault(group, {})[field] = value
    if args.verbose:
        found.setdefault("log", {})["level"] = "info"
    for attribute, (group, field) in _FLAGS.items():
        value = getattr(args, attribute, None)
        if value is not None:
            found.setdefault(group, {})[field] = (
                json.dumps(value) if isinstance(value, list) else value
            )
    return found
