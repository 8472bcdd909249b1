"""What the control plane costs: a step of 256 running requests, and finding a prompt of 32k tokens.

No model: plans are answered at once, copies with the next result. The cache is full, both tiers are
on, and every new block evicts or saves another, as in a server that has run for a while.

    python -m benchmarks.control_plane
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import median, quantiles
from time import perf_counter

from benchmarks.results_file import write_results
from rillgate_server.config.groups import BatcherConfig, CacheConfig
from rillgate_server.core.block_hash import root_hash
from rillgate_server.core.model_spec import CacheSizes, ModelSpec
from rillgate_server.core.request import ChoiceStart, Request
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import CopyDone, CopyJob, StepPlan, StepResult
from rillgate_server.kvcache.block_table import BlockTable
from rillgate_server.kvcache.cost_model import CostModel
from rillgate_server.kvcache.manager import KVCacheManager
from rillgate_server.kvcache.tier_plan import CachePolicy
from rillgate_server.scheduler.scheduler import Scheduler

NUM_RUNNING = 256
NUM_ROUNDS = 7
PROMPT_TOKENS, OUTPUT_TOKENS = 512, 256
DEVICE_BLOCKS, HOST_BLOCKS = 16_384, 65_536
"""256 requests hold 12,288 blocks at their end."""
STEP_LIMIT_MS = 1.5
LOOKUP_TOKENS = 32_768
NUM_LOOKUPS = 50
LOOKUP_LIMIT_MS = 5.0
COLD = "chain of hashes new"
FROM_HOST = "chain new, all blocks evict another one and are loaded"
BLOCK_TOKENS, BLOCK_BYTES = 16, 131_072
VOCAB_SIZE = 32_000
SPEC = ModelSpec("none", "00" * 32, "", "none", VOCAB_SIZE, 1 << 20, (), "bfloat16")


def done(jobs: Sequence[CopyJob]) -> tuple[CopyDone, ...]:
    """Report copies as ended, at 10 GB/s."""
    sizes = [(job.copy_id, len(job.pairs) * BLOCK_BYTES) for job in jobs]
    return tuple(
        CopyDone(copy_id, num_bytes=num_bytes, seconds=1e-4 + num_bytes / 1e10)
        for copy_id, num_bytes in sizes
    )


class Batch:
    """A scheduler whose device tier is full."""

    def __init__(self) -> None:
        """Fill the cache with prompts that are over."""
        self.scheduler = Scheduler(
            BatcherConfig(
                max_running=NUM_RUNNING, max_step_tokens=1 << 18, max_prefill_chunk_tokens=1 << 18
            ),
            CacheConfig(),
            SPEC,
            CacheSizes(DEVICE_BLOCKS, BLOCK_BYTES, SPEC.dtype, HOST_BLOCKS),
        )
        self._draw = random.Random(1)
        self._num_requests = 0
        self._copies: tuple[CopyJob, ...] = ()
        for _ in range(2):
            self.run_round()
        load = self.scheduler.load(0.0)
        assert load.copies.num_stored_blocks > 0, load
        assert load.device.num_evicted_blocks > 0, load

    def run_round(self) -> list[float]:
        """Run a full batch to its end; return the times of its decode steps in milliseconds."""
        for i in range(NUM_RUNNING):  # of 16 lengths, so that each step needs new blocks
            self._submit(PROMPT_TOKENS + i % 16)
        seconds: list[float] = []
        while self.scheduler.load(0.0).num_running or self.scheduler.load(0.0).num_waiting:
            elapsed, plan = self._step()
            if len(plan.rows) == NUM_RUNNING and all(row.num_tokens == 1 for row in plan.rows):
                seconds.append(elapsed)
        assert len(seconds) >= OUTPUT_TOKENS // 2, len(seconds)
        return [second * 1e3 for second in seconds]

    def _step(self) -> tuple[float, StepPlan]:
        """Run one step; return the scheduler's part of its time in seconds, and the plan."""
        begin = perf_counter()
        plan = self.scheduler.schedule(begin)
        planned = perf_counter()
        assert plan is not None, self.scheduler
        sampled = tuple((self._draw.randrange(VOCAB_SIZE),) for row in plan.rows if row.samples)
        result = StepResult(plan.step_id, sampled, finished_copies=done(self._copies))
        self._copies = plan.copies
        computed = perf_counter()
        self.scheduler.update(result, computed)
        return (planned - begin) + (perf_counter() - computed), plan

    def _submit(self, num_prompt_tokens: int) -> None:
        """Submit a prompt that nobody has sent before."""
        self._num_requests += 1
        prompt = tuple(self._draw.randrange(VOCAB_SIZE) for _ in range(num_prompt_tokens))
        sampling = SamplingParams(seed=1)
        request = Request(self._num_requests, prompt, (ChoiceStart(0),), sampling, OUTPUT_TOKENS)
        rejection = self.scheduler.add(replace(request, arrival_s=perf_counter()), perf_counter())
        assert rejection is None, rejection


class Lookup:
    """A cache that knows one long prompt, whole in one tier."""

    def __init__(self, *, is_in_host: bool) -> None:
        """Compute the prompt once; for the host tier, save it and evict it."""
        num_blocks = LOOKUP_TOKENS // BLOCK_TOKENS
        policy = CachePolicy(
            BLOCK_TOKENS,
            BLOCK_BYTES,
            root_hash(SPEC.version_digest, SPEC.dtype, BLOCK_TOKENS),
            load_policy="load",
        )
        self._draw = random.Random(1)
        self._manager = KVCacheManager(num_blocks + 16, 8 * num_blocks, policy, CostModel())
        self._is_in_host = is_in_host
        self.prompt = self._tokens(LOOKUP_TOKENS)
        self._compute(self.prompt)
        if is_in_host:
            self._evict()

    def find(self, table: BlockTable) -> float:
        """Start a sequence with the prompt and end it; return the start's milliseconds."""
        begin = perf_counter()
        started = self._manager.try_start(table, self.prompt)
        elapsed = perf_counter() - begin
        assert started is not None
        assert started.num_hit_tokens == LOOKUP_TOKENS - BLOCK_TOKENS, started
        assert bool(started.num_host_tokens) == self._is_in_host, started
        self._copy()
        self._manager.free(table)
        if self._is_in_host:
            self._evict()
        return elapsed * 1e3

    def _tokens(self, count: int) -> list[int]:
        return [self._draw.randrange(VOCAB_SIZE) for _ in range(count)]

    def _compute(self, token_ids: list[int]) -> None:
        """Let a sequence of these tokens come and go."""
        table = BlockTable()
        assert self._manager.try_start(table, token_ids, takes_hits=False) is not None
        self._manager.commit(table, token_ids, len(token_ids))
        self._manager.free(table)

    def _evict(self) -> None:
        """Save what is in the device tier, and fill that with something else."""
        while True:
            self._manager.plan_stores(0)
            if not self._copy():
                break
        self._compute(self._tokens(LOOKUP_TOKENS))

    def _copy(self) -> int:
        """End all copies that were decided; return how many."""
        jobs = self._manager.take_copies()
        self._manager.copies_done(done(jobs))
        return len(jobs)


def measure_lookups() -> dict[str, list[float]]:
    """Return milliseconds of each kind of lookup."""
    on_device, in_host = Lookup(is_in_host=False), Lookup(is_in_host=True)
    known = BlockTable()
    on_device.find(known)  # its chain is kept from now on
    samples: dict[str, list[float]] = {}
    for _ in range(NUM_LOOKUPS):
        samples.setdefault(COLD, []).append(on_device.find(BlockTable()))
        samples.setdefault("chain of hashes known", []).append(on_device.find(known))
        samples.setdefault(FROM_HOST, []).append(in_host.find(BlockTable()))
    return samples


def main() -> None:
    """Measure and write the result."""
    batch = Batch()
    rounds = [batch.run_round() for _ in range(NUM_ROUNDS)]
    steps_ms = [median(taken) for taken in rounds]
    rows = [
        {
            "what": f"schedule and update of a decode step of {NUM_RUNNING} running requests",
            "unit": "milliseconds, median of a round",
            "median": round(median(steps_ms), 4),
            "p99": [round(quantiles(taken, n=100)[98], 4) for taken in rounds],
            "samples": [round(sample, 4) for sample in steps_ms],
        }
    ]
    lookups = measure_lookups()
    rows += [
        {
            "what": f"lookup of a prompt of {LOOKUP_TOKENS} tokens: {where}",
            "unit": "milliseconds",
            "median": round(median(taken), 4),
            "samples": [round(sample, 4) for sample in taken],
        }
        for where, taken in lookups.items()
    ]
    ratios = {
        "step_of_256_over_1.5_ms": median(steps_ms) / STEP_LIMIT_MS,
        "lookup_of_32k_over_5_ms": median(lookups[COLD]) / LOOKUP_LIMIT_MS,
    }
    command = "python -m benchmarks.control_plane"
    path = write_results("control_plane", command, rows, ratios, packages=("rillgate",))
    for row in rows:
        print(f"{row['what']}: {row['median']} ms")
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
