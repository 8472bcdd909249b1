"""`make bench-int8`: INT8 and bf16 through gRPC, the engine alone, and other servers, in turn.

Two shapes, prompts of 128 tokens, none twice, 64 out, two threads, speculation off. Peers take part
where `make bench-peers` made them. The machine's limits are measured between all turns. Writes
`results/int8.json` after each round.

    int8_over_*, bf16_over_*     decode tokens/s, Rillgate through gRPC over a peer
    int8_end_to_end_over_*       output tokens/s from the first send to the last token
    bandwidth_fraction_1_*       bytes that a decode step of the engine alone reads (weights as
                                 stored, cache), one stream, over what the machine reads
    prefill_fraction_of_limit_*  operations of the layers in prefill, over the machine's
    int8_over_bf16_decode_*      the engine alone
"""

import argparse
import asyncio
import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare_cpu import NUM_PROMPT_TOKENS, PromptMaker, Prompts
from benchmarks.contestants.protocol import Contestant, Message
from benchmarks.contestants.rillgate_server import RillgateContestant
from benchmarks.peers.environments import PEERS, PeerMissing, start
from benchmarks.random_checkpoint import make_checkpoint
from benchmarks.results_file import write_results
from benchmarks.shapes import NUM_OUTPUT_TOKENS, SHAPES, add_arguments, concurrencies_of
from benchmarks.turns import DECODE, END_TO_END, Answer, Place, Turns

QUANTIZATIONS = {"bf16": "none", "int8": "int8"}
ENGINE = "benchmarks.contestants.engine_alone"
CACHED = "again"
"""Behind a contestant's name: the same prompts once more, out of the prefix cache."""
PARTS = "parts"
"""Behind an engine's name: with clocks around its kernels."""
PREFILL_STREAMS = 32
PEER_OF = {
    ("int8", "openvino"): "openvino_int8",
    ("int8", "llamacpp_q8"): "llamacpp_q8_0",
    ("bf16", "openvino"): "openvino_bf16",
    ("bf16", "llamacpp"): "llamacpp_bf16",
}
"""(our precision, a ratio's name for the peer) -> its rows' name."""

Ask = Callable[[Prompts], Message]


def run_shape(shape: str, arguments: argparse.Namespace, turns: Turns) -> list[Message]:
    """Start everybody, let them run in turn, and return the rows on the replicas' memory."""
    sizes = SHAPES[shape].sizes
    model_dir = make_checkpoint(SHAPES[shape].directory, sizes, torch.bfloat16)
    maker = PromptMaker(sizes["vocab_size"], seed=0)
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(RillgateContestant(str(model_dir), quantization))
            for name, quantization in QUANTIZATIONS.items()
        }
        asks = _asks(model_dir, servers, stack, lambda who, why: turns.fail(f"{shape}/{who}", why))
        for who, ask in asks.items():
            _warm_up(f"{shape}/{who}", ask, maker.make(2), turns)
        for number in range(arguments.rounds):
            print(f"{shape}: round {number + 1} of {arguments.rounds}", flush=True)
            for streams in concurrencies_of(shape, arguments):
                _take_turns(Place(shape, "", streams), number, asks, maker, turns)
            write(turns, [])
        return [
            {"shape": shape, "quantization": name}
            | server.memory_row(SHAPES[shape].stored_bytes(name))
            for name, server in servers.items()
        ]


def _asks(
    model_dir: Path,
    servers: dict[str, RillgateContestant],
    stack: contextlib.ExitStack,
    fail: Callable[[str, str], None],
) -> dict[str, Ask]:
    """Start engines and peers; return how each contestant is asked, in the order of their turns."""
    asks: dict[str, Ask] = {}
    for name, server in servers.items():
        asks[f"rillgate_{name}"] = _ask_server(server)
        engine = Contestant(ENGINE, [str(model_dir), QUANTIZATIONS[name]])
        stack.callback(engine.close)
        asks[f"engine_{name}"] = _ask_process(engine, "engine")
        asks[f"engine_{name}_{PARTS}"] = _ask_process(engine, PARTS)
    for peer in PEERS:
        try:
            contestant = start(peer, model_dir, make=False)
        except PeerMissing as missing:
            fail(peer.name, str(missing))
            continue
        stack.callback(contestant.close)
        asks[peer.name] = _ask_process(contestant, "batch")
    return asks


def _ask_server(server: RillgateContestant) -> Ask:
    return lambda prompts: asyncio.run(server.ask(prompts, NUM_OUTPUT_TOKENS))


def _ask_process(contestant: Contestant, mode: str) -> Ask:
    return lambda prompts: contestant.ask(mode, prompts, NUM_OUTPUT_TOKENS)


def _warm_up(key: str, ask: Ask, prompts: Prompts, turns: Turns) -> None:
    try:
        ask(prompts)
    except (RuntimeError, OSError) as error:
        turns.fail(key, str(error))


def _take_turns(
    at: Place, number: int, asks: dict[str, Ask], maker: PromptMaker, turns: Turns
) -> None:
    """Let everybody answer the same new prompts once, the servers of ours twice."""
    prompts = maker.make(at.concurrency)
    for who, ask in asks.items():
        if who.endswith(PARTS) and at.concurrency not in (1, PREFILL_STREAMS):
            continue
        place = Place(at.shape, who, at.concurrency)
        # A prompt is new to a process once: the engine's second turn gets others.
        own = maker.make(at.concurrency) if who.endswith(PARTS) else prompts
        turns.take(place, number, functools.partial(ask, own))
        if who.startswith("rillgate"):
            again = Place(at.shape, f"{who}_{CACHED}", at.concurrency)
            turns.take(again, number, functools.partial(ask, prompts))


def ratios(turns: Turns) -> dict[str, float]:
    """Take the ratios that the aims are read from; those without measurements are left out."""
    found: dict[str, float | None] = {}
    for streams in sorted({place.concurrency for place in turns.answers}):
        engines = [Place("05b", f"engine_{name}", streams) for name in ("int8", "bf16")]
        found[f"int8_over_bf16_decode_{streams}"] = turns.ratio(engines[0], engines[1], DECODE)
        for (precision, peer), row_name in PEER_OF.items():
            ours = Place("05b", f"rillgate_{precision}", streams)
            theirs = Place("05b", row_name, streams)
            found[f"{precision}_over_{peer}_{streams}"] = turns.ratio(ours, theirs, DECODE)
            if (precision, peer) == ("int8", "openvino"):
                name = f"int8_end_to_end_over_openvino_{streams}"
                found[name] = turns.ratio(ours, theirs, END_TO_END)
    for precision, label in (("int8", "int8"), ("bf16", "bf16_dense")):
        for shape in SHAPES:
            found[f"bandwidth_fraction_1_{label}_cpu_{shape}"] = turns.median(
                Place(shape, f"engine_{precision}", 1), _bandwidth_fraction(shape, precision)
            )
        found[f"prefill_fraction_of_limit_{label}_cpu"] = turns.median(
            Place("05b", f"engine_{precision}", PREFILL_STREAMS), _prefill_fraction(precision)
        )
    return {name: value for name, value in found.items() if value is not None}


def _bandwidth_fraction(shape: str, precision: str) -> Callable[[Answer], float]:
    """Return how to read it from an answer; the context is that of the middle decode step."""
    num_bytes = SHAPES[shape].read_bytes(precision, NUM_PROMPT_TOKENS + NUM_OUTPUT_TOKENS // 2)
    return lambda answer: (
        num_bytes / answer.message["decode_step_s"] / answer.best_limits.read_bytes_per_s
    )


def _prefill_fraction(precision: str) -> Callable[[Answer], float]:
    ops_per_token = SHAPES["05b"].prefill_ops_per_token()

    def fraction(answer: Answer) -> float:
        limits = answer.best_limits
        limit = limits.int8_ops_per_s if precision == "int8" else limits.bf16_ops_per_s
        return float(answer.message["prefill_tokens_per_s"] * ops_per_token / limit)

    return fraction


def write(turns: Turns, more_rows: list[dict[str, Any]]) -> None:  # Any: JSON
    """Write what there is so far."""
    write_results("int8", "make bench-int8", [*turns.rows(), *more_rows], ratios(turns))


def main() -> None:
    """Run the rounds of each shape, write and print the result."""
    parser = argparse.ArgumentParser(description="INT8 and bf16 beside other servers, in turn")
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    turns = Turns()
    memory: list[Message] = []
    for shape in arguments.shapes:
        memory += run_shape(shape, arguments, turns)
    write(turns, memory)
    for shape in arguments.shapes:
        print(turns.table(shape, concurrencies_of(shape, arguments)), flush=True)
    for name, value in ratios(turns).items():
        print(f"| {name} | {value:.2f} |")
    for row in memory:
        print(row)


if __name__ == "__main__":
    main()
