"""`rillgate bench`: loads a running server and reports its speed.

Owns that command's flags and output; `rillgate.bench` measures. Prompts are random token ids that
this server has not seen before, unless a dataset is given.
"""

import argparse
import asyncio
import json
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from rillgate._channel import plan_channel
from rillgate._progress import progress_bar
from rillgate.bench.measure import Sample, Series, measure
from rillgate.bench.plot import check_matplotlib, draw_png
from rillgate.bench.report import HEADERS, cells, to_json
from rillgate.bench.summary import Row, summarize
from rillgate.bench.workload import (
    BenchRequest,
    RandomPrompts,
    load_dataset,
    poisson_arrivals,
)
from rillgate.cli.arguments import (
    UsageError,
    add_connection_flags,
    client_config,
    connect,
    targets,
)
from rillgate.cli.terminal import print_table
from rillgate.types import ModelInfo

# Per series, where --num-requests is not given: this many rounds of the concurrency, but enough
# requests to speak of a p90.
_ROUNDS = 4
_MIN_REQUESTS = 10


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure a running server",
        description="Load a running server and report output tokens per second (from the first "
        "send to the last token), time to first token (ttft) and time per output token after the "
        "first (tpot): median, p90, p99. Prompts are random token ids that the server has not "
        "seen before, unless a dataset is given; each series has a row.",
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--concurrency",
        type=_int_list,
        default=[1, 4, 16],
        metavar="N,…",
        help="requests open at once, one series each (default: 1,4,16)",
    )
    load.add_argument(
        "--request-rate",
        type=_float_list,
        metavar="R,…",
        help="instead: requests per second on average, at random times, one series each",
    )
    load.add_argument(
        "--prompt-tokens", type=_positive_int, default=128, metavar="N", help="default: 128"
    )
    load.add_argument(
        "--output-tokens", type=_positive_int, default=64, metavar="N", help="default: 64"
    )
    load.add_argument(
        "--num-requests",
        type=_positive_int,
        metavar="N",
        help="per series (default: 4 rounds, at least 10; or the dataset's)",
    )
    load.add_argument(
        "--dataset",
        type=Path,
        metavar="FILE",
        help="instead of random prompts: JSON Lines with prompt, messages or token_ids, and maybe "
        "max_tokens; answers end where the model ends them",
    )
    load.add_argument("--ignore-eos", action="store_true", help="with --dataset: full lengths")
    load.add_argument(
        "--warmup",
        type=_positive_int,
        default=1,
        metavar="N",
        help="requests sent before, not measured (default: 1)",
    )
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of the arrival times")
    load.add_argument("--model", default="", help="one of `rillgate models`")
    report = parser.add_argument_group("report")
    report.add_argument("--json", type=Path, metavar="FILE", help="write rows and raw samples")
    report.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG; needs matplotlib")
    add_connection_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run every series, then report."""
    if args.plot is not None:
        try:
            check_matplotlib()
        except ImportError as error:
            raise UsageError(f"--plot needs matplotlib: {error}") from error
    source = _Source(args, _find_model(args))
    loads = args.request_rate or args.concurrency
    _measure(args, source.warmup(args.warmup), args.warmup, None, "0 (warm-up)")
    results = [_run_series(args, source, load) for load in loads]
    rows = [row for row, _ in results]
    print_table(HEADERS, [cells(row) for row in rows])
    for row in rows:
        if row.first_error:
            message = f"load {row.label}: {row.num_failed} failed; first: {row.first_error}"
            print(message, file=sys.stderr)
    if args.json is not None:
        report = to_json(source.settings(), results)
        _write(args.json, (json.dumps(report, indent=1) + "\n").encode())
    if args.plot is not None:
        _write(args.plot, draw_png(rows, "requests/s" if args.request_rate else "concurrency"))
    return 1 if any(row.num_failed for row in rows) else 0


class _Source:
    """Makes each series' requests: random ones, or the dataset's from where the last one ended."""

    def __init__(self, args: argparse.Namespace, model: ModelInfo) -> None:
        self._args = args
        self._model = model
        self._random = RandomPrompts(
            vocab_size=model.vocab_size,
            num_prompt_tokens=args.prompt_tokens,
            num_output_tokens=args.output_tokens,
            nonce=secrets.token_hex(8),
            excluded_token_ids=frozenset(model.eos_token_ids),
        )
        self._dataset: list[BenchRequest] = []
        self._next = 0
        if args.dataset is not None:
            try:
                self._dataset = load_dataset(args.dataset, args.output_tokens, args.ignore_eos)
            except (OSError, ValueError) as error:
                raise UsageError(str(error)) from error

    def warmup(self, num: int) -> list[BenchRequest]:
        """Make requests that are not measured; never the dataset's, which would then be cached."""
        return self._random.requests(num, "warmup")

    def requests(self, num: int, series: str) -> list[BenchRequest]:
        if not self._dataset:
            return self._random.requests(num, series)
        chosen = [self._dataset[(self._next + i) % len(self._dataset)] for i in range(num)]
        self._next += num
        return chosen

    def default_num_requests(self, load: float) -> int:
        return len(self._dataset) or max(_MIN_REQUESTS, round(_ROUNDS * load))

    def settings(self) -> dict[str, object]:
        """Say what was measured, for the JSON report."""
        return {
            "target": self._args.target,
            "model": self._model.name,
            "model_version": self._model.version,
            "dataset": None if self._args.dataset is None else str(self._args.dataset),
            "prompt_tokens": None if self._dataset else self._args.prompt_tokens,
            "output_tokens": self._args.output_tokens,
            "seed": self._args.seed,
            "nonce": self._random.nonce,
        }


def _run_series(args: argparse.Namespace, source: _Source, load: float) -> tuple[Row, list[Sample]]:
    """Run one concurrency, or one request rate."""
    num = args.num_requests or source.default_num_requests(load)
    is_rate = args.request_rate is not None
    label = f"{load:g}/s" if is_rate else f"{load:g}"
    arrivals_s = poisson_arrivals(load, num, args.seed) if is_rate else None
    requests = source.requests(num, label)
    samples = _measure(args, requests, None if is_rate else int(load), arrivals_s, label)
    return summarize(label, samples), samples


def _measure(
    args: argparse.Namespace,
    requests: Sequence[BenchRequest],
    max_concurrency: int | None,
    arrivals_s: Sequence[float] | None,
    label: str,
) -> list[Sample]:
    config = client_config(args)
    plan = plan_channel(targets(args), config)
    series = Series(requests, max_concurrency, arrivals_s, args.model, config.timeout_s)
    with progress_bar(len(requests), f"load {label}") as bar:
        return asyncio.run(measure(plan, series, bar.advance))


def _find_model(args: argparse.Namespace) -> ModelInfo:
    with connect(args) as client:
        models = client.models()
    if not args.model:
        return models[0]
    name = args.model.partition("@")[0]
    for model in models:
        if model.name == name:
            return model
    raise UsageError(f"no model {name!r}; served: {', '.join(model.name for model in models)}")


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def _int_list(text: str) -> list[int]:
    return [_positive_int(part) for part in text.split(",")]


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small; allowed: 1 and more")
    return value


def _float_list(text: str) -> list[float]:
    rates = [float(part) for part in text.split(",")]
    if min(rates) <= 0:
        raise argparse.ArgumentTypeError(f"{min(rates):g} is too small; allowed: above 0")
    return rates
