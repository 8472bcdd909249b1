"""Drives a scheduler over a FakeExecutor on a virtual clock; checks what holds at every step."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from rillgate_server.config.groups import BatcherConfig, CacheConfig, SpeculationConfig
from rillgate_server.core.clock import VirtualClock
from rillgate_server.core.load import TierLoad
from rillgate_server.core.model_spec import CacheSizes, ModelSpec
from rillgate_server.core.request import (
    ChoiceStart,
    Rejection,
    Request,
)
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.step import (
    CopyJob,
    RowPlan,
    StepOutput,
    StepPlan,
    StepResult,
)
from rillgate_server.engine.executor import Executor
from rillgate_server.engine.testing import FakeCopies, FakeExecutor, FakeModel
from rillgate_server.scheduler.scheduler import Scheduler
from tests.support.answers import EOS, MODEL, Answers
from tests.support.block_index import KnownBlocks

SPEC = ModelSpec(
    name="fake",
    version_digest="00" * 32,
    tokenizer_digest="",
    architecture="Qwen2ForCausalLM",
    vocab_size=MODEL.vocab_size,
    max_context_tokens=512,
    eos_token_ids=(EOS,),
    dtype="float32",
)
STEP_S = 0.01
"""What a step takes on the virtual clock."""
BLOCK_BYTES = 1024
NO_SPECULATION = SpeculationConfig()
MAX_DRAIN_STEPS = 1000
"""Within which copies that nobody waits for must end."""
_INSTANT = FakeCopies()


@dataclass(frozen=True, slots=True)
class Limits:
    """A scheduler's settings, small enough that every limit is met."""

    num_blocks: int = 64
    block_size_tokens: int = 4
    max_step_tokens: int = 64
    max_prefill_chunk_tokens: int = 16
    max_running: int = 8
    max_waiting_requests: int = 100
    max_waiting_tokens: int = 10_000
    prefix_caching: bool = True
    num_host_blocks: int = 0
    load_policy: str = "auto"
    audit: bool = False
    speculation: SpeculationConfig = NO_SPECULATION
    max_plans_in_flight: int = 1

    def make_scheduler(self) -> Scheduler:
        """Build an idle scheduler."""
        batcher = BatcherConfig(
            max_step_tokens=self.max_step_tokens,
            max_prefill_chunk_tokens=self.max_prefill_chunk_tokens,
            max_running=self.max_running,
            max_waiting_requests=self.max_waiting_requests,
            max_waiting_tokens=self.max_waiting_tokens,
            max_plans_in_flight=self.max_plans_in_flight,
        )
        cache = CacheConfig(
            block_size_tokens=self.block_size_tokens,
            prefix_caching=self.prefix_caching,
            load_policy=self.load_policy,
            audit=self.audit,
        )
        sizes = CacheSizes(self.num_blocks, BLOCK_BYTES, SPEC.dtype, self.num_host_blocks)
        return Scheduler(batcher, cache, SPEC, sizes, self.speculation)

    def make_executor(
        self,
        model: FakeModel,
        copies: FakeCopies = _INSTANT,
        before_step: Callable[[StepPlan], None] | None = None,
        fail_rows: Callable[[RowPlan, Sequence[int]], str | None] | None = None,
    ) -> FakeExecutor:
        """Build its data plane. `copies` says how copies go, these limits what room there is."""
        return FakeExecutor(
            self.num_blocks,
            self.block_size_tokens,
            model,
            before_step=before_step,
            fail_rows=fail_rows,
            copies=replace(
                copies,
                num_host_blocks=self.num_host_blocks,
                audit=self.audit,
                block_bytes=BLOCK_BYTES,
            ),
        )


def make_request(
    request_id: int,
    prompt: Iterable[int] = range(10, 20),
    max_tokens: int = 8,
    choices: Sequence[ChoiceStart] = (ChoiceStart(0),),
    sampling: SamplingParams | None = None,
) -> Request:
    """Build a request with small defaults; what else it needs, `dataclasses.replace` sets."""
    return Request(
        request_id,
        tuple(prompt),
        tuple(choices),
        sampling or SamplingParams(seed=request_id, temperature=0.0),
        max_tokens,
    )


class StepLost(Exception):
    """A step that the executor did not finish, because the test said so."""


class Driver:
    """A scheduler, an executor and a clock, stepped by the test."""

    def __init__(
        self,
        limits: Limits = Limits(),
        *,
        fail_rows: Callable[[RowPlan, Sequence[int]], str | None] | None = None,
        model: FakeModel = MODEL,
        copies: FakeCopies = _INSTANT,
    ) -> None:
        """Start idle. `copies` says how copies go; `limits` how much room the host tier has."""
        self.limits = limits
        self.clock = VirtualClock()
        self.scheduler = limits.make_scheduler()
        self.fake = limits.make_executor(model, copies, self._before_step, fail_rows)
        self.executor: Executor = self.fake
        self.answers = Answers()
        self.plans: list[StepPlan] = []
        self.outputs: list[StepOutput] = []
        self.known = KnownBlocks()
        """What somebody knows who watches the cache from the start."""
        self.scheduler.watch_blocks(is_on=True)
        self.in_flight: dict[int, CopyJob] = {}
        """Copies that a plan began and no result has reported."""
        self.loses_next_step = False
        """Whether the executor raises in the next step, once its copies have begun."""

    def submit(self, request: Request) -> Rejection | None:
        """Add a request; expects an answer unless it is refused."""
        rejection = self.scheduler.add(request, self.clock.now())
        if rejection is None:
            self.answers.expect(request)
        self.scheduler.check_integrity()
        return rejection

    def abort(self, request_id: int, choice_indices: tuple[int, ...] = ()) -> None:
        """Abort as a caller does who forgets the request at once."""
        self.scheduler.abort(request_id, choice_indices)
        answer = self.answers.of[request_id]
        answer.aborted |= set(choice_indices) - answer.finished.keys()
        if not choice_indices:
            self.answers.gone.add(request_id)
        self.scheduler.check_integrity()

    def begin(self) -> StepPlan | None:
        """Schedule, and check what holds for every plan."""
        plan = self.scheduler.schedule(self.clock.now())
        self.scheduler.check_integrity()
        if plan is not None:
            self.in_flight |= {job.copy_id: job for job in plan.copies}
            self._check_plan(plan)
            self.plans.append(plan)
        return plan

    def end(self, plan: StepPlan) -> StepOutput:
        """Execute and update; a step that the executor loses fails its requests."""
        try:
            result = self.executor.execute(plan)
        except StepLost as error:
            self.clock.advance(STEP_S)
            return self._took(self.scheduler.fail_plan(str(error), self.clock.now()))
        return self.apply(result)

    def apply(self, result: StepResult) -> StepOutput:
        """Update with a result, and collect what it means."""
        self.clock.advance(STEP_S)
        for done in result.finished_copies:
            del self.in_flight[done.copy_id]
        return self._took(self.scheduler.update(result, self.clock.now()))

    def _took(self, output: StepOutput) -> StepOutput:
        self.scheduler.check_integrity()
        self._watch()
        load = self.scheduler.load(self.clock.now())
        _check_sum(load.device, self.limits.num_blocks)
        _check_sum(load.host, self.limits.num_host_blocks)
        self.outputs.append(output)
        self.answers.take(output)
        return output

    def _watch(self) -> None:
        delta = self.scheduler.take_block_changes()
        if delta is not None:
            self.known.take_delta(delta)
        assert self.known.equals(self.scheduler.cached_hashes()), "the cache is not as it was told"

    def flush(self) -> None:
        """Forget everything that is cached."""
        self.scheduler.flush_cache()
        self.scheduler.check_integrity()
        self._watch()

    def step(self) -> StepOutput | None:
        """Run one whole step; None when nothing is to be computed."""
        plan = self.begin()
        if plan is None:
            self.answers.take(self.scheduler.take_events())
            return None
        return self.end(plan)

    def run(self, max_steps: int = 3000) -> None:
        """Run until nothing is left; a livelock ends in an error."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"still at work after {max_steps} steps: {self.scheduler}")

    def _before_step(self, plan: StepPlan) -> None:
        if self.loses_next_step:
            self.loses_next_step = False
            raise StepLost(f"step {plan.step_id} is lost")

    def _check_plan(self, plan: StepPlan) -> None:
        assert plan.rows or self.in_flight, "an empty plan, and no copy to wait for"
        slots = [row.slot for row in plan.rows]
        assert len(set(slots)) == len(slots), "two rows for one slot"
        num_tokens = sum(row.num_tokens for row in plan.rows)
        assert num_tokens <= self.limits.max_step_tokens, "over the budget"
        assert all(0 <= slot < self.limits.max_running for slot in slots)

    def check_idle(self) -> None:
        """Prove that nothing is held any more, once the copies in flight have ended."""
        self.drain_copies()
        load = self.scheduler.load(self.clock.now())
        assert (load.num_running, load.num_loading, load.num_waiting) == (0, 0, 0)
        for tier in (load.device, load.host):
            assert (tier.num_blocks_used, tier.num_blocks_copying) == (0, 0), tier
        self.scheduler.check_integrity()

    def drain_copies(self) -> None:
        """Step on until no copy is in flight."""
        for _ in range(MAX_DRAIN_STEPS):
            if not self.in_flight:
                return
            assert self.step() is not None, f"nobody waits for {self.in_flight}"
        raise AssertionError(f"still in flight: {self.in_flight}")

    def check_answers(self) -> None:
        """Prove that every request that nobody aborted has exactly its reference answer."""
        self.answers.check(self.limits.block_size_tokens)


def _check_sum(tier: TierLoad, num_blocks: int) -> None:
    """Prove that each block of a tier is in one place."""
    assert tier.num_blocks == num_blocks
    places = (
        tier.num_blocks_free,
        tier.num_blocks_used,
        tier.num_blocks_cached,
        tier.num_blocks_copying,
    )
    assert min(places) >= 0, tier
    assert sum(places) == num_blocks, tier
