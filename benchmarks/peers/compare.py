"""`make bench-peers`: other servers on the same random weights, converted by their own tools.

Installs what is missing (benchmarks/peers/*.txt) into `.bench/`; what cannot be had is named, and
the others go on. Prompts of 128 tokens, 64 out, two threads. Writes `results/peers.json`; `make
bench-int8` runs Rillgate in turn with them and takes the ratios.
"""

import argparse
from collections.abc import Callable

import torch

from benchmarks.compare_cpu import PromptMaker, Prompts
from benchmarks.contestants.protocol import Contestant, Message
from benchmarks.peers.environments import PEERS, PeerMissing, start
from benchmarks.random_checkpoint import make_checkpoint
from benchmarks.results_file import write_results
from benchmarks.shapes import NUM_OUTPUT_TOKENS, SHAPES, add_arguments, concurrencies_of
from benchmarks.turns import Place, Turns


def _ask(contestant: Contestant, prompts: Prompts) -> Callable[[], Message]:
    return lambda: contestant.ask("batch", prompts, NUM_OUTPUT_TOKENS)


def main() -> None:
    """Measure each peer alone, one at a time in memory."""
    parser = argparse.ArgumentParser(description="other servers alone, on the same weights")
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    turns = Turns()
    for name in arguments.shapes:
        maker = PromptMaker(SHAPES[name].sizes["vocab_size"], seed=1)
        model_dir = make_checkpoint(SHAPES[name].directory, SHAPES[name].sizes, torch.bfloat16)
        for peer in PEERS:
            try:
                contestant = start(peer, model_dir, make=True)
            except PeerMissing as missing:
                turns.fail(f"{name}/{peer.name}", str(missing))
                continue
            for number in range(arguments.rounds):
                for streams in concurrencies_of(name, arguments):
                    prompts = maker.make(streams)
                    place = Place(name, peer.name, streams)
                    turns.take(place, number, _ask(contestant, prompts))
            contestant.close()
            write_results("peers", "make bench-peers", turns.rows(), {})
        print(turns.table(name, concurrencies_of(name, arguments)), flush=True)


if __name__ == "__main__":
    main()
