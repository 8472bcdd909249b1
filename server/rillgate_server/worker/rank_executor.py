"""Rank 0 of a split model, as the engine sees it: one executor, whose steps all ranks carry out.

Owns what makes K workers one: the plan goes to all, rank 0 alone samples and the others learn the
tokens with the next plan, a copy has ended when it has on all ranks. Does not know layers or
requests.

    rank 0   plan k + tokens of k-1 ──▶ ranks     compute ═ collectives ═ compute, sample
    rank r   ◀── compute ═ collectives ═ compute ──▶ report k (copies that ended)

What a fault means (contracts, section 1): a step that raises on all ranks at the same place (after
equally many collectives: a plan that contradicts the slots) fails alone, and its copies run. One
that raises on some ranks leaves the others inside a collective: the group is lost, RankLost.
"""

from dataclasses import asdict, replace

from rillgate_server.core.model_spec import FreeMemory, KVLayout, ModelSpec
from rillgate_server.core.step import CopyDone, StepLimits, StepPlan, StepResult
from rillgate_server.core.step_codec import (
    RankReport,
    SampledTokens,
    decode_report,
    encode_plan,
    sampled_tokens,
)
from rillgate_server.errors import RankLost
from rillgate_server.worker.compute_device import Device, FindFreeMemory
from rillgate_server.worker.rank_group import RankGroup
from rillgate_server.worker.rank_watch import OnLost
from rillgate_server.worker.worker import Worker

CHECKSUM_BITS = 32
"""Of a CRC: the checksum of a whole block has those of all ranks' parts side by side."""
FAILED_STEP_S = 5.0
"""Within which a step that raises on one rank must have raised on all."""
GO_ON = b"go on"
"""From rank 0 after a step that failed on all ranks alike."""


class RankExecutor:
    """The executor of a split model (engine.executor.Executor), on the engine's thread.

    State: the tokens that the last step sampled, and copies that ended on some ranks only.
    """

    def __init__(self, worker: Worker, group: RankGroup) -> None:
        """Drive `worker`, which is rank 0's, and the others through `group`."""
        self._worker = worker
        self._group = group
        self._sampled: SampledTokens = ()
        self._ended: dict[int, dict[int, CopyDone]] = {}  # copy -> rank -> its end there

    def __repr__(self) -> str:
        """Show the group."""
        return f"RankExecutor({self._group}, {self._worker})"

    @property
    def device(self) -> Device:
        """Of rank 0."""
        return self._worker.device

    @property
    def spec(self) -> ModelSpec:
        """Of the model."""
        return self._worker.spec

    @property
    def layout(self) -> KVLayout:
        """Of a block on each rank."""
        return self._worker.layout

    @property
    def num_pageable_host_blocks(self) -> int:
        """See Worker."""
        return self._worker.num_pageable_host_blocks

    @property
    def draft_block_bytes(self) -> int:
        """See Worker; on rank 0, but counted for all."""
        return self._worker.draft_block_bytes

    def spare_memory(self, find_free_memory: FindFreeMemory, limits: StepLimits) -> FreeMemory:
        """Wait until all ranks have loaded; return what the poorest may take for its cache.

        `find_free_memory` says what is free for this one.
        """
        self._group.tell({"limits": asdict(limits)})
        own = self._worker.spare_memory(find_free_memory, limits)
        others = [FreeMemory(**answer["free_memory"]) for answer in self._group.hear()]
        return own.least(others)

    def allocate_cache(
        self,
        num_device_blocks: int,
        num_host_blocks: int = 0,
        audit: bool = False,
        limits: StepLimits | None = None,
    ) -> None:
        """Reserve both tiers on all ranks. Raises as Worker does; ConfigError for another's."""
        sizes = {"device": num_device_blocks, "host": num_host_blocks, "audit": audit}
        self._group.tell(sizes | {"limits": None if limits is None else asdict(limits)})
        self._worker.allocate_cache(num_device_blocks, num_host_blocks, audit, limits)
        self._group.hear()
        self._sampled = ()
        self._ended.clear()

    def call_on_loss(self, on_lost: OnLost) -> None:
        """See RankGroup."""
        self._group.call_on_loss(on_lost)

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute one plan on all ranks. Raises RankLost, or what all ranks raise."""
        data = encode_plan(plan, self._sampled)
        self._sampled = ()
        for link in self._group.links.values():
            link.send(data)
        try:
            result = self._worker.execute(own_part(plan, 0))
        except RankLost:
            raise
        except Exception as error:  # the border between ranks: have the others failed alike?
            self._check_all_failed(plan.step_id, error)
            raise
        reports = {rank: self._report(rank, plan.step_id) for rank in self._group.links}
        for rank, report in reports.items():
            if report.failure:
                raise RankLost(
                    f"rank {rank} failed at step {plan.step_id}, which rank 0 has done: "
                    f"{report.failure}"
                )
        self._sampled = sampled_tokens(plan, result)
        finished = {rank: report.finished_copies for rank, report in reports.items()}
        return replace(result, finished_copies=self._merged({0: result.finished_copies} | finished))

    def close(self) -> None:
        """Give the cache up, end the copies and the other ranks."""
        self._worker.close()
        self._group.leave()

    def _report(self, rank: int, step_id: int, timeout_s: float | None = None) -> RankReport:
        report = decode_report(self._group.links[rank].receive(timeout_s))
        if report.step_id != step_id:
            raise RankLost(f"rank {rank} is at step {report.step_id}, rank 0 at {step_id}")
        return report

    def _check_all_failed(self, step_id: int, error: Exception) -> None:
        """Raise RankLost unless all ranks raised at the same place; else let them go on."""
        own = self._group.collectives.num_entered
        for rank in self._group.links:
            report = self._report(rank, step_id, FAILED_STEP_S)
            if not report.failure or report.num_collectives != own:
                raise RankLost(
                    f"rank 0 failed at step {step_id} after {own} collectives, rank {rank} "
                    f"{'failed' if report.failure else 'ended it'} after "
                    f"{report.num_collectives}: {error}"
                ) from error
        for link in self._group.links.values():
            link.send(GO_ON)

    def _merged(self, finished: dict[int, tuple[CopyDone, ...]]) -> tuple[CopyDone, ...]:
        """Take in what ended on each rank; return what has ended on all."""
        done = []
        for rank, copies in finished.items():
            for copy in copies:
                ended = self._ended.setdefault(copy.copy_id, {})
                ended[rank] = copy
                if len(ended) == self._group.place.ranks:
                    done.append(merge_copies(self._ended.pop(copy.copy_id)))
        return tuple(done)


def own_part(plan: StepPlan, rank: int) -> StepPlan:
    """Return the plan with the checksums of a rank's own parts of blocks."""
    if all(job.checksums is None for job in plan.copies):
        return plan
    mask = (1 << CHECKSUM_BITS) - 1
    return replace(
        plan,
        copies=tuple(
            job
            if job.checksums is None
            else replace(
                job,
                checksums=tuple((c >> CHECKSUM_BITS * rank) & mask for c in job.checksums),
            )
            for job in plan.copies
        ),
    )


def merge_copies(of: dict[int, CopyDone]) -> CopyDone:
    """Return the end of a copy that has ended on all ranks; a pair failed if it did on any."""
    failed = {pair for done in of.values() for pair in done.failed_pairs}
    refused = {pair for done in of.values() if done.num_refused for pair in done.failed_pairs}
    checksums: tuple[int, ...] = ()
    if all(done.checksums for done in of.values()):
        checksums = tuple(
            sum(checksum << CHECKSUM_BITS * rank for rank, checksum in zip(of, parts, strict=True))
            for parts in zip(*(done.checksums for done in of.values()), strict=True)
        )
    return CopyDone(
        next(iter(of.values())).copy_id,
        tuple(sorted(failed)),
        sum(done.num_bytes for done in of.values()),
        max(done.seconds for done in of.values()),
        checksums,
        "; ".join(f"rank {rank}: {done.message}" for rank, done in of.items() if done.message),
        num_refused=len(refused),
    )
