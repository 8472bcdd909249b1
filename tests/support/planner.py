"""A small, obvious planner that drives a worker without the scheduler.

Chunked prefill, decode rows beside it, prefixes shared by giving two slots the same blocks. Blocks
are handed out once and never again unless freed by their last holder, smallest number first.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import (
    RowPlan,
    SlotStart,
    StepPlan,
    StepResult,
    TokenLogprobs,
)


class Executes(Protocol):
    """A worker or a model runner."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one plan."""
        ...


@dataclass
class Job:
    """One choice to run, and what came of it."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: SamplingParams = field(
        default_factory=lambda: SamplingParams(seed=0, temperature=0.0)
    )
    given: Sequence[int] = ()
    """Tokens that were generated before."""
    starts_at_step: int = 0
    shares_with: int | None = None
    """Index of an earlier job whose computed full blocks may be shared."""
    wants_prompt_logprobs: bool = False

    tokens: list[int] = field(default_factory=list)
    """Generated, given ones included."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_shared_tokens: int = 0
    is_started: bool = False
    is_done: bool = False
    failure: str | None = None

    @property
    def known(self) -> list[int]:
        """All tokens known so far."""
        return [*self.prompt, *self.tokens]


class Planner:
    """Makes plans for a list of jobs until all are done. A job's slot is its index."""

    def __init__(self, num_blocks: int, block_size: int, step_tokens: int, chunk: int) -> None:
        """Allow `step_tokens` per step and `chunk` of one prompt in it."""
        self._free = list(range(num_blocks))
        self._holders: dict[int, int] = {}  # block -> slots that hold it
        self._block_size = block_size
        self._step_tokens = step_tokens
        self._chunk = chunk
        self.num_mixed_steps = 0

    def run(
        self,
        worker: Executes,
        jobs: Sequence[Job],
        fault: Callable[[StepPlan], StepPlan] = lambda plan: plan,
    ) -> None:
        """Run all jobs; `fault` may spoil each plan on its way to the worker."""
        for job in jobs:
            job.tokens = list(job.given)
        ended: list[int] = []
        step_id = 0
        while not all(job.is_done for job in jobs):
            plan = self._plan(jobs, step_id, tuple(ended))
            result = worker.execute(fault(plan))
            assert result.step_id == step_id
            ended = self._apply(jobs, plan, result)
            step_id += 1
            assert step_id < 10_000

    def _plan(self, jobs: Sequence[Job], step_id: int, ended: tuple[int, ...]) -> StepPlan:
        starts: list[SlotStart] = []
        rows: list[RowPlan] = []
        budget = self._step_tokens
        for slot, job in enumerate(jobs):
            if job.is_done or job.starts_at_step > step_id or budget == 0:
                continue
            if not job.is_started:
                self._share_prefix(jobs, job)
            num_tokens = min(len(job.known) - job.num_computed, self._chunk, budget)
            budget -= num_tokens
            end = job.num_computed + num_tokens
            new_blocks = self._take(job, end)
            if not job.is_started:
                table, new_blocks = tuple(job.blocks), ()
                starts.append(
                    SlotStart(slot, tuple(job.known), len(job.prompt), table, job.sampling, 0)
                )
                job.is_started = True
            rows.append(
                RowPlan(
                    slot,
                    job.num_computed,
                    num_tokens,
                    new_blocks,
                    samples=end == len(job.known),
                    prompt_logprobs=job.wants_prompt_logprobs
                    and job.num_computed < len(job.prompt),
                )
            )
        lengths = {row.num_tokens == 1 for row in rows}
        self.num_mixed_steps += len(lengths) == 2
        return StepPlan(step_id, tuple(starts), tuple(rows), ended)

    def _apply(self, jobs: Sequence[Job], plan: StepPlan, result: StepResult) -> list[int]:
        """Take the result in; return the slots that ended."""
        ended = []
        sampled = iter(result.token_ids)
        logprobs = iter(result.logprobs or ((),) * len(result.token_ids))
        for slot, found in result.prompt_logprobs:
            jobs[slot].prompt_logprobs.extend(found)
        for row in plan.rows:
            job = jobs[row.slot]
            job.num_computed = row.start + row.num_tokens
            if not row.samples:
                continue
            job.tokens.extend(next(sampled))
            job.logprobs.extend(next(logprobs))
        for failed in result.failed_rows:
            jobs[failed.slot].failure = failed.message
        for row in plan.rows:
            job = jobs[row.slot]
            if len(job.tokens) >= job.max_tokens or job.failure:
                job.is_done = True
                self._release(job)
                ended.append(row.slot)
        return ended

    def _share_prefix(self, jobs: Sequence[Job], job: Job) -> None:
        """Take the parent's computed full blocks, as far as the tokens agree."""
        if job.shares_with is None:
            return
        parent = jobs[job.shares_with]
        if parent.is_done:
            return
        agreeing = 0
        for ours, theirs in zip(job.known[:-1], parent.known[: parent.num_computed], strict=False):
            if ours != theirs:
                break
            agreeing += 1
        num_blocks = agreeing // self._block_size
        for block in parent.blocks[:num_blocks]:
            self._holders[block] += 1
            job.blocks.append(block)
        job.num_computed = job.num_shared_tokens = num_blocks * self._block_size

    def _take(self, job: Job, end: int) -> tuple[int, ...]:
        needed = -(-end // self._block_size) - len(job.blocks)
        taken = [heapq.heappop(self._free) for _ in range(needed)]
        for block in taken:
            self._holders[block] = 1
        job.blocks.extend(taken)
        return tuple(taken)

    def _release(self, job: Job) -> None:
        for block in job.blocks:
            self._holders[block] -= 1
            if self._holders[block] == 0:
                heapq.heappush(self._free, block)
