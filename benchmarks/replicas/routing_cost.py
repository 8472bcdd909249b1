"""What it costs to route one request: `choose`, `sent` and `ended` of the real router.

The prefix policy over 8 replicas whose views each hold 20,000 hashes, the prompt's among them or
not: all of its blocks cached everywhere is the dearest case, for the whole prompt is hashed and
looked up in every view.
"""

import argparse
import random
import time
from dataclasses import replace
from statistics import median, quantiles
from typing import Any

from benchmarks.replicas.cluster import WELCOME
from rillgate_server.core.block_events import MAX_EVENT_HASHES, BlockChange, BlockEvent
from rillgate_server.core.load import EngineLoad, FittedCosts
from rillgate_server.routing.router import Router, RouteRequest, request_hashes

NUM_REPLICAS, NUM_INDEXED_BLOCKS = 8, 20_000
PROMPT_TOKENS = (100, 1000, 4000)
NUM_REQUESTS = 300
LOAD = EngineLoad(costs=FittedCosts(0.01, 1e-4, 0.0, 1e-4), longest_step_s=0.1)

Row = dict[str, Any]  # Any: JSON


def full_router(cached: RouteRequest, draw: random.Random) -> Router:
    """Return a router whose replicas hold all of a request, and much else."""
    router = Router("prefix")
    known = list(request_hashes(cached, WELCOME))
    for i in range(NUM_REPLICAS):
        view = router.add(f"r{i}")
        view.connected(replace(WELCOME, max_running=64), 0.0)
        view.heard_load(LOAD, 0.0)
        hashes = known + [draw.randbytes(16) for _ in range(NUM_INDEXED_BLOCKS - len(known))]
        for number, first in enumerate(range(0, len(hashes), MAX_EVENT_HASHES), 1):
            named = tuple(hashes[first : first + MAX_EVENT_HASHES])
            assert view.apply(BlockEvent(number, BlockChange.STORED, hashes=named))
        assert view.num_blocks == NUM_INDEXED_BLOCKS
    return router


def route_us(router: Router, request: RouteRequest) -> float:
    """Route one request and end it; return the microseconds that took."""
    began_s = time.perf_counter()
    placement = router.choose(request, 0.1)
    assert placement is not None
    router.ended(router.sent(placement, request, 0.1))
    return (time.perf_counter() - began_s) * 1e6


def measure(num_requests: int = NUM_REQUESTS) -> tuple[list[Row], dict[str, float]]:
    """Return rows and ratios; `routing_us` is the largest of the medians."""
    draw = random.Random(0)
    tokens = tuple(draw.randrange(WELCOME.vocab_size) for _ in range(max(PROMPT_TOKENS)))
    router = full_router(RouteRequest(tokens), draw)
    rows: list[Row] = []
    for num_tokens in PROMPT_TOKENS:
        cached = RouteRequest(tokens[:num_tokens])
        new = RouteRequest(tuple(reversed(cached.prompt_token_ids)))
        for what, request in (("cached everywhere", cached), ("not cached", new)):
            taken = [route_us(router, request) for _ in range(num_requests)]
            row = {
                "what": f"routing, a prompt of {num_tokens} tokens, {what}",
                "unit": "microseconds",
                "median": round(median(taken), 1),
                "p99": round(quantiles(taken, n=100)[98], 1),
                "samples": [round(sample, 1) for sample in taken],
            }
            rows.append(row)
            print(f"{row['what']}: {row['median']} us, p99 {row['p99']} us", flush=True)
    return rows, {"routing_us": max(row["median"] for row in rows)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="what it costs to route one request")
    parser.add_argument("--requests", type=int, default=NUM_REQUESTS, help="of each kind")
    measure(parser.parse_args().requests)


if __name__ == "__main__":
    main()
