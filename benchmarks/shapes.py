"""The two shapes that speed is measured in, and how many bytes a step reads of them."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.compare_cpu import CONCURRENCIES, linear_elements
from benchmarks.random_checkpoint import QWEN_0_5B, QWEN_1_5B
from benchmarks.results_file import ROOT

NUM_OUTPUT_TOKENS = 64
_BF16_BYTES = 2
_WEIGHT_BYTES = {"bf16": 2, "int8": 1}
"""Of a weight of a layer; embedding and output head have two in both."""
_SCALE_BYTES = 4
"""One per output channel in INT8; a thousandth of the weights, and counted."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A random checkpoint's shape."""

    sizes: dict[str, int]
    directory: Path

    def stored_bytes(self, precision: str) -> int:
        """Return the bytes of all matrices: layers, head, embedding."""
        return self.read_bytes(precision, 0) + linear_elements(self.sizes)[1] * _BF16_BYTES

    def read_bytes(self, precision: str, num_context_tokens: int) -> int:
        """Return what a decode step reads: layers, head, and the cache of that many tokens."""
        layers, head = linear_elements(self.sizes)
        scales = self._num_channels() * _SCALE_BYTES if precision == "int8" else 0
        cache = num_context_tokens * self._cache_bytes_per_token()
        return layers * _WEIGHT_BYTES[precision] + scales + head * _BF16_BYTES + cache

    def prefill_ops_per_token(self) -> float:
        """Return multiplications and additions of the layers' products; the head is left out."""
        return 2.0 * linear_elements(self.sizes)[0]

    def _kv_size(self) -> int:
        head_dim = self.sizes["hidden_size"] // self.sizes["num_attention_heads"]
        return head_dim * self.sizes["num_key_value_heads"]

    def _num_channels(self) -> int:
        hidden, intermediate = self.sizes["hidden_size"], self.sizes["intermediate_size"]
        per_layer = 3 * hidden + 2 * self._kv_size() + 2 * intermediate
        return self.sizes["num_hidden_layers"] * per_layer

    def _cache_bytes_per_token(self) -> int:
        return self.sizes["num_hidden_layers"] * 2 * self._kv_size() * _BF16_BYTES


_BUILD = ROOT / "build" / "bench"
SHAPES = {
    "05b": Shape(QWEN_0_5B, _BUILD / "qwen2.5-0.5b-shape"),
    "15b": Shape(QWEN_1_5B, _BUILD / "qwen2.5-1.5b-shape"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--rounds`, `--shapes` and `--concurrency`."""
    parser.add_argument("--rounds", type=int, default=3, help="rounds of everybody (3)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--concurrency",
        nargs="+",
        type=int,
        help=f"streams (05b: {' '.join(map(str, CONCURRENCIES))}; 15b: 1)",
    )


def concurrencies_of(shape: str, arguments: argparse.Namespace) -> tuple[int, ...]:
    """Return how many streams a shape is measured with."""
    if arguments.concurrency:
        return tuple(arguments.concurrency)
    return CONCURRENCIES if shape == "05b" else (1,)
