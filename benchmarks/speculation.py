"""What speculation brings and costs: the engine alone, off and on in turn, on the same prompts.

`python -m benchmarks.speculation` writes `results/speculation.json`. Greedy, two threads, a random
bf16 checkpoint of Qwen2.5-0.5B's shape, 1 and 8 streams.

    repeats    the answer goes round in circles: a random model does so where a bias keeps it among
               a few tokens, as real ones do in tables, code and quotations
    fresh      random prompts, answers without repetition: nothing to gain, so what is lost shows

    speculation_<method>_over_off_<text>_<streams>   medians of the rounds' ratios of tokens per s
    speculation_<method>_tokens_per_step_<text>_<streams>
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare_cpu import PromptMaker
from benchmarks.random_checkpoint import QWEN_0_5B, make_checkpoint
from benchmarks.results_file import ROOT, write_results
from rillgate_server.config.groups import BatcherConfig, CacheConfig, SpeculationConfig
from rillgate_server.core.clock import SystemClock
from rillgate_server.core.model_spec import CacheSizes
from rillgate_server.core.request import ChoiceStart, Request, Speculation
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.engine.engine import Engine
from rillgate_server.scheduler.scheduler import Scheduler
from rillgate_server.worker.worker import Worker, WorkerOptions

CHECKPOINT = ROOT / "build" / "bench" / "qwen2.5-0.5b-shape"
TINY_CHECKPOINT = ROOT / "build" / "bench" / "tiny-shape"
TINY = QWEN_0_5B | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 128,
}
METHODS = (Speculation.OFF, Speculation.PROMPT_LOOKUP, Speculation.AUTO)
STREAMS = (1, 8)
LOOP_TOKENS = 24
"""That a bias keeps the answer among: each keeps its own follower, so it soon comes round."""
_NUM_BLOCKS = 1024

Found = dict[tuple[str, Speculation, int], list[dict[str, float]]]  # (text, method, streams)


class SpeculatingEngine:
    """One engine with one worker, loaded once; each request says what it drafts by."""

    def __init__(self, model_dir: Path) -> None:
        """Load the checkpoint and allocate the cache."""
        worker = Worker.load(model_dir, WorkerOptions(num_threads=2))
        worker.allocate_cache(_NUM_BLOCKS)
        sizes = CacheSizes(_NUM_BLOCKS, worker.layout.block_bytes, worker.layout.kv_dtype)
        self.scheduler = Scheduler(
            BatcherConfig(), CacheConfig(), worker.spec, sizes, SpeculationConfig()
        )
        self._engine = Engine(self.scheduler, worker, SystemClock())
        self._ids = itertools.count()

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        num_tokens: int,
        method: Speculation,
    ) -> dict[str, float]:
        """Run all prompts at once; return what decoding took from the first token on."""
        for prompt in prompts:
            start = (ChoiceStart(0),)
            request = Request(
                next(self._ids), tuple(prompt), start, sampling, num_tokens, speculation=method
            )
            rejection = self.scheduler.add(request, time.monotonic())
            assert rejection is None, rejection
        begin, num_steps, num_output = 0.0, 0, 0
        drafted, accepted = self._counts()
        while self.scheduler.has_work:
            output = self._engine.step()
            if not begin:  # the prompts fit into one step
                begin = time.perf_counter()
            elif output is not None:
                num_steps += 1
                num_output += sum(len(entry.token_ids) for entry in output.tokens)
        seconds = time.perf_counter() - begin
        now_drafted, now_accepted = self._counts()
        return {
            "tokens_per_s": num_output / seconds,
            "tokens_per_step": num_output / num_steps / len(prompts),
            "num_drafted": now_drafted - drafted,
            "num_accepted": now_accepted - accepted,
        }

    def _counts(self) -> tuple[int, int]:
        load = self.scheduler.load(0.0)
        return load.num_drafted_tokens, load.num_accepted_tokens


def measure(engine: SpeculatingEngine, num_rounds: int, num_tokens: int) -> Found:
    """Let all methods answer the same prompts, round by round; who goes first changes."""
    vocab_size = QWEN_0_5B["vocab_size"]
    maker = PromptMaker(vocab_size, seed=1)
    bias = tuple((token_id, 100.0) for token_id in range(100, 100 + LOOP_TOKENS))
    samplings = {
        "repeats": SamplingParams(0, temperature=0.0, logit_bias=bias),
        "fresh": SamplingParams(0, temperature=1.0),
    }
    found: Found = {}
    for number in range(num_rounds + 1):
        for streams, (text, sampling) in itertools.product(STREAMS, samplings.items()):
            prompts = maker.make(streams)
            order = METHODS[number % 3 :] + METHODS[: number % 3]
            for method in order:
                answer = engine.answer(prompts, sampling, num_tokens, method)
                engine.scheduler.flush_cache()  # a hit would spare the next one its prefill
                if number:  # the first round warms up
                    found.setdefault((text, method, streams), []).append(answer)
    return found


def rows_of(found: Found) -> list[dict[str, Any]]:  # Any: JSON
    """One row per text, method and number of streams."""
    return [
        {
            "text": text,
            "method": method.value,
            "streams": streams,
            "decode_tokens_per_s": _median(answers, "tokens_per_s"),
            "tokens_per_step": _median(answers, "tokens_per_step"),
            "drafted": sum(int(it["num_drafted"]) for it in answers),
            "accepted": sum(int(it["num_accepted"]) for it in answers),
            "samples": [round(it["tokens_per_s"], 2) for it in answers],
        }
        for (text, method, streams), answers in found.items()
    ]


def _median(answers: Sequence[dict[str, float]], name: str) -> float:
    return round(statistics.median(it[name] for it in answers), 2)


def ratios(found: Found) -> dict[str, float]:
    """Take the medians of the rounds' ratios over `off`."""
    values = {}
    for (text, method, streams), answers in found.items():
        if method is Speculation.OFF:
            continue
        name, place = method.value.replace("-", "_"), f"{text}_{streams}"
        pairs = zip(answers, found[text, Speculation.OFF, streams], strict=True)
        values[f"speculation_{name}_over_off_{place}"] = statistics.median(
            on["tokens_per_s"] / off["tokens_per_s"] for on, off in pairs
        )
        values[f"speculation_{name}_tokens_per_step_{place}"] = statistics.median(
            it["tokens_per_step"] for it in answers
        )
    return values


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="what speculation brings and costs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    parser.add_argument("--smoke", action="store_true", help="a tiny model; writes no result")
    args = parser.parse_args()
    torch.set_num_threads(2)
    directory, shape = (TINY_CHECKPOINT, TINY) if args.smoke else (CHECKPOINT, QWEN_0_5B)
    model_dir = make_checkpoint(directory, shape, torch.bfloat16)
    found = measure(SpeculatingEngine(model_dir), args.rounds, args.tokens)
    rows, values = rows_of(found), ratios(found)
    for row in rows:
        print({key: value for key, value in row.items() if key != "samples"})
    for name, value in values.items():
        print(f"{name}: {value:.3f}")
    if not args.smoke:
        command = f"python -m benchmarks.speculation --rounds {args.rounds} --tokens {args.tokens}"
        print(write_results("speculation", command, rows, values).name)


if __name__ == "__main__":
    main()
