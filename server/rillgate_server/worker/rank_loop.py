"""A rank of a split model other than rank 0: it does what rank 0's plans say, until told to end.

Owns the loop and nothing else; holds no opinion. What a fault means is in worker.rank_executor.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict

from rillgate_server.core.step import CopyDone, StepLimits
from rillgate_server.core.step_codec import RankReport, decode_plan, encode_report
from rillgate_server.errors import RankLost, RillgateError
from rillgate_server.worker.compute_device import FindFreeMemory
from rillgate_server.worker.rank_executor import FAILED_STEP_S, GO_ON, own_part
from rillgate_server.worker.rank_group import RankGroup
from rillgate_server.worker.rank_link import RankLink
from rillgate_server.worker.worker import Worker

_log = logging.getLogger(__name__)


def run_rank(
    worker: Worker,
    group: RankGroup,
    find_free_memory: FindFreeMemory,
    on_ready: Callable[[], None],
) -> None:
    """Carry out plans until rank 0 ends; `on_ready` is called when the first one may come.

    `find_free_memory` says what this rank may take for its cache. Raises RankLost, and what
    reserving the cache does (which rank 0 then hears).
    """
    (link,) = group.links.values()
    (asked,) = group.hear()
    spare = worker.spare_memory(find_free_memory, StepLimits(**asked["limits"]))
    group.tell({"free_memory": asdict(spare)})
    (sizes,) = group.hear()
    limits = None if sizes["limits"] is None else StepLimits(**sizes["limits"])
    try:
        worker.allocate_cache(sizes["device"], sizes["host"], sizes["audit"], limits)
    except RillgateError as error:
        group.refuse(str(error))
        raise
    group.tell({})
    on_ready()
    try:
        while data := group.next_plan():
            _carry_out(data, worker, group, link)
    finally:
        worker.close()
    group.leave()


def _carry_out(data: bytes, worker: Worker, group: RankGroup, link: RankLink) -> None:
    plan, sampled = decode_plan(data)
    failure = ""
    copies: tuple[CopyDone, ...] = ()
    try:
        worker.note_sampled(sampled)
        copies = worker.execute(own_part(plan, group.place.rank)).finished_copies
    except RankLost:
        raise
    except Exception as error:  # the border between ranks: rank 0 knows whether all failed
        _log.exception("step %d failed on rank %d", plan.step_id, group.place.rank)
        failure = f"{type(error).__name__}: {error}"
    entered = group.collectives.num_entered
    link.send(encode_report(RankReport(plan.step_id, failure, entered, copies)))
    if failure and link.receive(FAILED_STEP_S) != GO_ON:
        raise RankLost(f"rank 0 did not fail at step {plan.step_id}, this rank did: {failure}")
