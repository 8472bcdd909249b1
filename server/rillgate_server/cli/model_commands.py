"""The commands `models quantize` and `models inspect`: with a checkpoint, before it is served.

Owns the flags. What runs is imported when it is chosen: it loads torch.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from rillgate_server.config.groups import ALSO_QUANTIZED
from rillgate_server.core.quantization import INT8, Quantization
from rillgate_server.errors import RillgateError

EXIT_OPERATOR = 2

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_model_commands(subparsers: Subparsers) -> None:
    """Add them below `models`, which the client's commands have, too."""
    models = subparsers.choices.get("models") or subparsers.add_parser("models")
    commands = models.add_subparsers(metavar="COMMAND", title="with a checkpoint on this machine")
    quantize = commands.add_parser(
        "quantize",
        help="write a checkpoint with its layers in INT8, which loads faster",
        description="Writes a new checkpoint in compressed-tensors' format (int-quantized), and "
        "copies its tokenizer. `rillgate serve --model OUT` serves it.",
    )
    quantize.add_argument("source", metavar="IN", type=Path, help="a plain checkpoint's directory")
    quantize.add_argument("target", metavar="OUT", type=Path, help="a new directory")
    quantize.add_argument("--method", choices=(INT8,), default=INT8, help="(int8)")
    quantize.add_argument(
        "--exclude",
        metavar="PATTERN",
        action="append",
        default=[],
        help="leave layers of such names as they are (*.down_proj); may be repeated",
    )
    quantize.add_argument(
        "--include",
        choices=ALSO_QUANTIZED,
        action="append",
        default=[],
        help="quantise this, too; may be repeated",
    )
    quantize.set_defaults(run=_quantize)
    inspect = commands.add_parser(
        "inspect",
        help="print the memory that a checkpoint takes, for each way to hold it",
        description="Reads config.json and the headers of the weights' files, no weights.",
    )
    inspect.add_argument("model_dir", metavar="DIR", type=Path, help="a checkpoint's directory")
    inspect.add_argument(
        "--tensor-parallel",
        metavar="K",
        type=int,
        default=1,
        help="processes that the model is split over (1)",
    )
    inspect.set_defaults(run=_inspect)


def _quantize(args: argparse.Namespace) -> int:
    quantization = Quantization(args.method, tuple(args.exclude), tuple(args.include))
    module = importlib.import_module("rillgate_server.worker.quantization.command")
    return _answer(lambda: module.run_quantize(args.source, args.target, quantization))


def _inspect(args: argparse.Namespace) -> int:
    module = importlib.import_module("rillgate_server.worker.memory_needs")
    return _answer(lambda: module.run_inspect(args.model_dir, args.tensor_parallel))


def _answer(run: Callable[[], int]) -> int:
    """Run it, and say what is wrong with what was asked."""
    try:
        code = run()
    except RillgateError as error:
        print(f"rillgate: {error}", file=sys.stderr, flush=True)
        return EXIT_OPERATOR
    return code
