"""The plans that the data plane has and whose results are not there yet.

Owns their order, what a result must look like, how long a step took where two overlap, and how
long the device stood idle between steps. Does not know what a plan is formed from, nor what a
result means for requests (the scheduler does).

    form ──▶ | newest | … | oldest | ──take_oldest──▶ being applied ──applied──▶ over
                                   └──take_all──▶ failed

Results come in the order of plans. A plan is formed of positions and blocks alone, so it hangs on
the ones before it: where one fails, all behind it do.

    began  plan k   |────────── computed ─────────▶ result k
    began  plan k+1      | begun, and waits        |──── its own seconds ───▶ result k+1
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from rillgate_server.core.step import RowPlan, StepPlan, StepResult, StepTimes
from rillgate_server.errors import EngineFailure
from rillgate_server.kvcache.cost_model import StepWork
from rillgate_server.scheduler.sequence import Sequence, SequenceState

_NUM_AVERAGED_STEPS = 100
"""Whose idle time is averaged, about: some seconds' worth, and one late step is a hundredth."""


@dataclass(frozen=True, slots=True)
class OpenPlan:
    """A plan whose result is not there yet."""

    plan: StepPlan
    sequences: tuple[Sequence, ...]
    """One per row, in the plan's order."""
    started: tuple[Sequence, ...]
    """Those that begin to run with this step."""
    work: StepWork
    began_s: float
    is_following: bool
    """Whether something ran when it was formed: if the device was idle then, it should not be."""

    @property
    def rows(self) -> Iterator[tuple[RowPlan, Sequence]]:
        """Each row with whose it is, in the plan's order."""
        return zip(self.plan.rows, self.sequences, strict=True)


class OpenPlans:
    """Up to `max_plans` plans, oldest first.

    State: the plans, the one whose result is being applied, number and time of the latest that is
    over, and the average of idle times with how many there were.
    """

    def __init__(self, max_plans: int) -> None:
        """Start without a plan."""
        self.max_plans = max_plans
        self.done_step_id = 0
        self.device_idle_s = 0.0
        """Before a step that followed another, average of late."""
        self.num_following_steps = 0
        """Steps that followed another, since the start."""
        self._plans: deque[OpenPlan] = deque()
        self._applying: OpenPlan | None = None
        self._done_s = -math.inf

    def __len__(self) -> int:
        return len(self._plans)

    def __iter__(self) -> Iterator[OpenPlan]:
        return iter(self._plans)

    def __repr__(self) -> str:
        steps = [opened.plan.step_id for opened in self._plans]
        return f"OpenPlans(steps={steps}, max={self.max_plans}, idle_s={self.device_idle_s:.6f})"

    @property
    def is_full(self) -> bool:
        """Whether no further plan may be formed before a result."""
        return len(self._plans) >= self.max_plans

    @property
    def newest(self) -> OpenPlan:
        """The plan that was formed last."""
        return self._plans[-1]

    def add(self, opened: OpenPlan) -> None:
        """Take in a plan that was formed."""
        assert not self.is_full, self
        self._plans.append(opened)

    def take_oldest(self, result: StepResult) -> OpenPlan:
        """Return the oldest plan, whose result this is; it is over with `applied`.

        Raises EngineFailure, and changes nothing, when the result does not fit the plan.
        """
        assert self._plans, "no plan is open"
        _check_result(self._plans[0].plan, result)
        self._applying = self._plans.popleft()
        return self._applying

    def applied(self, times: StepTimes, now: float) -> float:
        """Note that the plan taken is over; return the step's own seconds.

        They begin with the result of the step before, if that came later than the plan: what two
        steps overlap counts once.
        """
        opened = self._applying
        assert opened is not None, "no plan is being applied"
        self._applying = None
        seconds = now - max(opened.began_s, self._done_s)
        self._done(opened, now)
        if opened.is_following and opened.plan.rows:
            self._note_idle(times.device_idle_s)
        return seconds

    def take_all(self, now: float) -> tuple[OpenPlan | None, list[OpenPlan]]:
        """Give all plans up; return (the one whose result was being applied, those still open)."""
        applying, self._applying = self._applying, None
        plans = list(self._plans)
        self._plans.clear()
        for opened in (applying, *plans):
            if opened is not None:
                self._done(opened, now)
        return applying, plans

    def _done(self, opened: OpenPlan, now: float) -> None:
        self.done_step_id, self._done_s = opened.plan.step_id, now

    def _note_idle(self, seconds: float) -> None:
        self.num_following_steps += 1
        weight = 1.0 / min(self.num_following_steps, _NUM_AVERAGED_STEPS)
        self.device_idle_s += weight * (seconds - self.device_idle_s)

    def check_integrity(self, holders: list[Sequence]) -> None:
        """Prove that each of `holders`, all that have a slot, knows what the plans do with it."""
        assert len(self._plans) <= self.max_plans
        num_plans: dict[int, int] = {}  # id of a sequence -> plans that name it
        num_pending: dict[int, int] = {}
        num_planned: dict[int, int] = {}
        for opened in self._plans:
            for row, sequence in opened.rows:
                key = id(sequence)
                num_plans[key] = num_plans.get(key, 0) + 1
                num_pending[key] = num_pending.get(key, 0) + row.samples
                num_planned[key] = row.start + row.num_tokens - len(row.draft_token_ids)
                assert sequence.drafts is None or num_plans[key] == 1, sequence
        assert num_plans.keys() <= set(map(id, holders)), "an open plan names who has no slot"
        for sequence in holders:
            key = id(sequence)
            assert sequence.num_plans == num_plans.get(key, 0), sequence
            assert sequence.num_pending == num_pending.get(key, 0), sequence
            if sequence.state is SequenceState.RUNNING:
                known = num_planned.get(key, sequence.num_computed)
                assert sequence.num_planned == known, sequence
                asked = sequence.num_generated + sequence.num_pending
                assert asked <= sequence.group.request.max_tokens, sequence


def _check_result(plan: StepPlan, result: StepResult) -> None:
    """Refuse a result that is not the plan's; it is our bug, and nothing is applied yet."""
    sampling = [row for row in plan.rows if row.samples]
    if result.step_id != plan.step_id or len(result.token_ids) != len(sampling):
        raise EngineFailure(
            f"result of step {result.step_id} with {len(result.token_ids)} entries; "
            f"the open plan is {plan.step_id} with {len(sampling)} sampling rows"
        )
    failed = {row.slot for row in result.failed_rows}
    for row, token_ids in zip(sampling, result.token_ids, strict=True):
        if row.slot in failed:
            continue
        drafts = row.draft_token_ids
        if (
            not 1 <= len(token_ids) <= 1 + len(drafts)
            or drafts[: len(token_ids) - 1] != token_ids[:-1]
        ):
            raise EngineFailure(f"slot {row.slot} sampled {token_ids} behind drafts {drafts}")
