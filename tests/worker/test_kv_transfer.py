"""Copies between the tiers: the bytes, the order, the audit, and whatever can go wrong."""

import re
import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rillgate_server.core.model_spec import KVLayout
from rillgate_server.core.step import CopyDirection, CopyJob
from rillgate_server.worker.kv_tiers import reserve_tiers
from rillgate_server.worker.kv_transfer import (
    BlockCopier,
    KVTransfer,
    MemoryCopier,
    Pairs,
    adjacent_runs,
)
from tests.support.kv_copies import (
    LOAD,
    PATIENCE_S,
    STORE,
    GatedCopier,
    check_audit,
    check_random_copies,
    fill,
    wait_all,
)

LAYOUT = KVLayout.build(4, "bfloat16", (((2, 24), (2, 16), None), ((1, 5), (1, 3), 8)))
NUM_DEVICE_BLOCKS = 33
NUM_HOST_BLOCKS = 50


def tiers() -> BlockCopier:
    """Reserve two tiers in memory."""
    return reserve_tiers(LAYOUT, NUM_DEVICE_BLOCKS, NUM_HOST_BLOCKS, torch.device("cpu"))


class FailingCopier(MemoryCopier):
    """Fails the copies of even first sources, after it has written something."""

    def copy(self, direction: CopyDirection, pairs: Pairs) -> None:
        """Copy, or write half and raise."""
        if pairs[0][0] % 2 == 0:
            super().copy(direction, pairs[:1])
            raise RuntimeError("the bus is on fire")
        super().copy(direction, pairs)


class LostCopier(MemoryCopier):
    """Cannot even say what the device does."""

    def work_so_far(self) -> Callable[[], None]:
        """Raise."""
        raise RuntimeError("the device is gone")


@pytest.mark.parametrize("seed", range(10))
def test_random_jobs_out_and_back_leave_every_block_as_indexing_would(seed: int) -> None:
    """Several jobs at a time in both directions; blocks that no job names keep their bytes."""
    check_random_copies(tiers(), seed)


def test_audit_finds_a_bit_that_changed_in_the_host_tier() -> None:
    """One pair of three fails, says so, and does not count; the others are whole."""
    check_audit(tiers())


def test_audit_finds_bytes_that_change_on_the_way_back() -> None:
    """What counts is what arrived, not what was sent."""

    class Spoiler(MemoryCopier):
        def copy(self, direction: CopyDirection, pairs: Pairs) -> None:
            super().copy(direction, pairs)
            if direction is LOAD:
                self.device.bytes[pairs[0][1], 7] ^= 16

    memory = tiers()
    fill(memory.device.bytes, 3)
    transfer = KVTransfer(Spoiler(memory.device, memory.host), audit=True)
    transfer.begin(CopyJob(0, STORE, ((4, 8), (5, 9))))
    checksums = wait_all(transfer, 1)[0].checksums
    transfer.begin(CopyJob(1, LOAD, ((8, 14), (9, 15)), checksums))
    assert wait_all(transfer, 1)[1].failed_pairs == (0,)
    transfer.close()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_runs_are_the_pairs_they_come_from(pairs: list[tuple[int, int]]) -> None:
    """Taken apart again they are the same pairs in the same order, and none could be longer."""
    runs = list(adjacent_runs(pairs))
    apart = [(source + i, target + i) for source, target, length in runs for i in range(length)]
    assert apart == pairs
    for (source, target, length), following in pairwise(runs):
        assert following[:2] != (source + length, target + length)


@pytest.mark.parametrize(
    ("job", "says"),
    [
        (CopyJob(7, STORE, ((0, 1), (NUM_DEVICE_BLOCKS, 2))), "block 33 .* to 2; there are 33 and"),
        (CopyJob(7, LOAD, ((1, 0), (2, NUM_DEVICE_BLOCKS))), "to 33; there are 50 and 33"),
        (CopyJob(7, STORE, ((-1, 0), (1, 1))), "block -1"),
        (CopyJob(7, LOAD, ((0, 1), (1, 2)), (5,)), "1 checksums came for 2 blocks"),
        (CopyJob(7, STORE, ((0, 1), (1, 2)), (5, 6)), "2 checksums came for 2 blocks"),
    ],
)
def test_a_job_that_names_what_is_not_there_fails_whole_and_touches_nothing(
    job: CopyJob, says: str
) -> None:
    """It is reported like any other, and the job behind it runs."""
    memory = tiers()
    fill(memory.device.bytes, 1)
    device, host = memory.device.bytes.clone(), memory.host.bytes.clone()
    transfer = KVTransfer(memory)
    transfer.begin(job)
    transfer.wait_any(PATIENCE_S)
    (done,) = transfer.take_finished()
    assert (done.copy_id, done.failed_pairs, done.num_bytes) == (7, (0, 1), 0)
    assert re.search(says, done.message)
    assert torch.equal(memory.device.bytes, device)
    assert torch.equal(memory.host.bytes, host)
    transfer.begin(CopyJob(8, STORE, ((3, 4),)))
    assert wait_all(transfer, 1)[8].failed_pairs == ()
    transfer.close()


def test_without_a_host_tier_a_copy_fails_and_no_thread_is_made() -> None:
    """A replica with one tier pays nothing for the other."""
    transfer = KVTransfer(reserve_tiers(LAYOUT, 3, 0, torch.device("cpu")))
    transfer.begin(CopyJob(0, STORE, ((0, 0),)))
    (done,) = transfer.take_finished()
    assert done.failed_pairs == (0,)
    assert not [thread for thread in threading.enumerate() if thread.name == "rillgate-copies"]


def test_a_copy_that_raises_is_reported_and_the_next_one_runs() -> None:
    """All of its pairs count as failed, whatever was written; the thread lives."""
    memory = tiers()
    transfer = KVTransfer(FailingCopier(memory.device, memory.host))
    for copy_id, first in enumerate((2, 3, 4)):
        transfer.begin(CopyJob(copy_id, STORE, ((first, first), (first + 20, first + 20))))
    done = wait_all(transfer, 3)
    assert [done[i].failed_pairs for i in range(3)] == [(0, 1), (), (0, 1)]
    assert [done[i].num_bytes for i in range(3)] == [0, 2 * LAYOUT.block_bytes, 0]
    assert done[0].message == "RuntimeError: the bus is on fire"
    transfer.close()


def test_beginning_never_raises() -> None:
    """A device that is gone is a failed copy; the step says the rest."""
    memory = tiers()
    transfer = KVTransfer(LostCopier(memory.device, memory.host))
    transfer.begin(CopyJob(0, STORE, ((0, 0),)))
    assert wait_all(transfer, 1)[0].message == "RuntimeError: the device is gone"
    transfer.close()


def test_without_a_thread_a_copy_fails_and_the_next_one_tries_again() -> None:
    """A system that is out of threads for a moment costs the copies of that moment alone."""
    transfer = KVTransfer(tiers())
    before = threading.stack_size(1 << 46)  # more than an address space has
    try:
        transfer.begin(CopyJob(0, STORE, ((0, 0),)))
    finally:
        threading.stack_size(before)
    transfer.begin(CopyJob(1, STORE, ((1, 1),)))
    done = wait_all(transfer, 2)
    assert (done[0].failed_pairs, done[1].failed_pairs) == ((0,), ())
    assert "thread" in done[0].message
    transfer.close()


def test_reports_come_once_and_in_the_jobs_order() -> None:
    """Nothing ends behind the gate; then each job is reported, and no longer than its own time."""
    gated = GatedCopier(tiers())
    transfer = KVTransfer(gated)
    for copy_id in range(4):
        transfer.begin(CopyJob(copy_id, STORE, ((copy_id, copy_id),)))
    assert gated.begun.wait(PATIENCE_S)
    transfer.wait_any(0.001)
    assert transfer.take_finished() == ()
    gated.gate.set()
    assert list(wait_all(transfer, 4)) == [0, 1, 2, 3]
    assert transfer.take_finished() == ()
    transfer.wait_any(PATIENCE_S)  # returns at once: nothing is in flight
    transfer.close()


def test_waiting_keeps_the_report_for_whoever_takes_it() -> None:
    """A second wait returns at once, and the report is there."""
    transfer = KVTransfer(tiers())
    transfer.begin(CopyJob(0, STORE, ((0, 0),)))
    transfer.wait_any(PATIENCE_S)
    transfer.wait_any(PATIENCE_S)
    assert [done.copy_id for done in transfer.take_finished()] == [0]
    transfer.close()


def test_closing_ends_the_thread_once_its_job_is_done() -> None:
    """The memory can go then; nobody waits for the jobs behind it."""
    memory = tiers()
    fill(memory.device.bytes, 2)
    gated = GatedCopier(memory)
    transfer = KVTransfer(gated)
    for copy_id in range(3):
        transfer.begin(CopyJob(copy_id, STORE, ((copy_id, copy_id),)))
    assert gated.begun.wait(PATIENCE_S)
    closing = threading.Thread(target=transfer.close)
    closing.start()
    gated.gate.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert not [thread for thread in threading.enumerate() if thread.name == "rillgate-copies"]
    assert torch.equal(memory.host.bytes[0], memory.device.bytes[0])
    transfer.close()  # twice is fine
