"""Does a decode step of the scheduler cost the same in a large pool as in a small one?

Times schedule and update, without any model, while every block of the pool has been used: so each
new block evicts a cached one, as in a server that has run for a while. Pools of both sizes take
turns within one run, so that a busy machine meets both.

    python -m benchmarks.pool_size
"""

from dataclasses import replace
from statistics import median
from time import perf_counter

from benchmarks.results_file import write_results
from rillgate_server.config.groups import BatcherConfig, CacheConfig
from rillgate_server.core.model_spec import CacheSizes, ModelSpec
from rillgate_server.core.request import ChoiceStart, Request
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import StepPlan, StepResult
from rillgate_server.scheduler.scheduler import Scheduler

NUM_BLOCKS = (1_000, 100_000)
NUM_RUNNING = 32
NUM_ROUNDS = 40
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 256
"""32 such requests hold 784 blocks at their end: they fit into the smaller pool."""
VOCAB_SIZE = 32_000
SPEC = ModelSpec("none", "00" * 32, "", "none", VOCAB_SIZE, 1 << 21, (), "bfloat16")


class Pool:
    """A scheduler over a pool whose blocks are all in use or cached."""

    def __init__(self, num_blocks: int, num_running: int) -> None:
        """Fill the pool with one long prompt's blocks."""
        self.num_blocks = num_blocks
        self.num_running = num_running
        self.scheduler = Scheduler(
            BatcherConfig(max_running=num_running, max_step_tokens=1 << 16),
            CacheConfig(),
            SPEC,
            CacheSizes(num_blocks, block_bytes=1, kv_dtype=SPEC.dtype),
        )
        self._num_requests = 0
        self._submit(num_blocks * CacheConfig().block_size_tokens, 1)
        while self.scheduler.has_work:
            self._step()
        load = self.scheduler.load(0.0)
        assert load.device.num_blocks_cached >= num_blocks - 1, load

    def run_round(self) -> float:
        """Run a full batch to its end; return the median time of a decode step in microseconds."""
        for i in range(self.num_running):  # of 16 lengths, so that each step needs new blocks
            self._submit(PROMPT_TOKENS + i % 16, OUTPUT_TOKENS)
        seconds: list[float] = []
        while self.scheduler.has_work:
            elapsed, plan = self._step()
            is_decode = not plan.starts and len(plan.rows) == self.num_running
            if is_decode and all(row.num_tokens == 1 for row in plan.rows):
                seconds.append(elapsed)
        assert len(seconds) == OUTPUT_TOKENS - 1, len(seconds)
        return median(seconds) * 1e6

    def _step(self) -> tuple[float, StepPlan]:
        """Run one step; return the scheduler's part of its time in seconds, and the plan."""
        begin = perf_counter()
        plan = self.scheduler.schedule(begin)
        planned = perf_counter()
        assert plan is not None
        sampled = tuple((7,) for row in plan.rows if row.samples)
        result = StepResult(plan.step_id, sampled)
        computed = perf_counter()
        self.scheduler.update(result, computed)
        return (planned - begin) + (perf_counter() - computed), plan

    def _submit(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Submit a prompt that nobody has sent before."""
        self._num_requests += 1
        first = self._num_requests % VOCAB_SIZE
        prompt = (first, self._num_requests // VOCAB_SIZE, *([5] * (num_prompt_tokens - 2)))
        sampling = SamplingParams(seed=1)
        request = Request(self._num_requests, prompt, (ChoiceStart(0),), sampling, max_tokens)
        rejection = self.scheduler.add(replace(request, arrival_s=perf_counter()), 0.0)
        assert rejection is None, rejection


def main() -> None:
    """Measure and write the result."""
    pools = [Pool(num_blocks, NUM_RUNNING) for num_blocks in NUM_BLOCKS]
    pools.append(Pool(NUM_BLOCKS[1], 256))
    samples: list[list[float]] = [[] for _ in pools]
    for number in range(NUM_ROUNDS):
        order = range(len(pools)) if number % 2 else reversed(range(len(pools)))
        for i in order:
            samples[i].append(pools[i].run_round())
    rows = [
        {
            "pool_blocks": pool.num_blocks,
            "running": pool.num_running,
            "unit": "microseconds of one decode step in schedule and update, median of a round",
            "median": round(median(taken), 2),
            "free_blocks_at_end": pool.scheduler.load(0.0).device.num_blocks_free,
            "samples": [round(sample, 2) for sample in taken],
        }
        for pool, taken in zip(pools, samples, strict=True)
    ]
    ratio = median(large / small for small, large in zip(samples[0], samples[1], strict=True))
    ratios = {"decode_step_pool_100000_over_1000": ratio}
    path = write_results(
        "pool_size", "python -m benchmarks.pool_size", rows, ratios, packages=("rillgate",)
    )
    for row in rows:
        print(f"{row['pool_blocks']:>7} blocks, {row['running']:>3} running: {row['median']} us")
    print(f"ratio {ratio:.3f}, written to {path.name}")


if __name__ == "__main__":
    main()
