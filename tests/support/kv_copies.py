"""Copies between two tiers of random bytes, for any copier: what every one of them must do."""

import random
from collections.abc import Callable
from threading import Event

import torch
from torch import Tensor

from rillgate_server.core.step import CopyDirection, CopyDone, CopyJob
from rillgate_server.worker.kv_transfer import BlockCopier, KVTransfer, Pairs

STORE, LOAD = CopyDirection.DEVICE_TO_HOST, CopyDirection.HOST_TO_DEVICE
PATIENCE_S = 60.0
"""For what takes milliseconds; the machine may be busy."""


def fill(memory: Tensor, seed: int) -> None:
    """Fill a tier with random bytes."""
    generator = torch.Generator().manual_seed(seed)
    memory.copy_(torch.randint(256, memory.shape, dtype=torch.uint8, generator=generator))


def wait_all(transfer: KVTransfer, num_copies: int) -> dict[int, CopyDone]:
    """Wait for so many reports; return them by their copy's id."""
    found: dict[int, CopyDone] = {}
    while len(found) < num_copies:
        transfer.wait_any(PATIENCE_S)
        finished = transfer.take_finished()
        assert finished, f"only {len(found)} of {num_copies} copies ended"
        found |= {done.copy_id: done for done in finished}
    return found


def random_jobs(rng: random.Random, first_id: int, num_device: int, num_host: int) -> list[CopyJob]:
    """Make jobs in both directions that share no block; some pairs are adjacent, most are not."""
    device, host = list(range(num_device)), list(range(num_host))
    if rng.random() < 0.7:
        rng.shuffle(device)
        rng.shuffle(host)
    jobs: list[CopyJob] = []
    for _ in range(rng.randint(1, 5)):
        length = rng.randint(1, 6)
        ours, device = device[:length], device[length:]
        theirs, host = host[:length], host[length:]
        direction = rng.choice((STORE, LOAD))
        sides = (ours, theirs) if direction is STORE else (theirs, ours)
        jobs.append(CopyJob(first_id + len(jobs), direction, tuple(zip(*sides, strict=True))))
    return jobs


def check_random_copies(copier: BlockCopier, seed: int, num_rounds: int = 20) -> None:
    """Run rounds of random jobs, and compare both tiers with what plain indexing gives."""
    rng = random.Random(seed)
    transfer = KVTransfer(copier)
    device, host = copier.device, copier.host
    fill(device.bytes, seed)
    fill(host.bytes, seed + 1)
    expected_device, expected_host = device.bytes.cpu().clone(), host.bytes.cpu().clone()
    first_id = 0
    for _ in range(num_rounds):
        jobs = random_jobs(rng, first_id, device.num_blocks, host.num_blocks)
        first_id += len(jobs)
        for job in jobs:
            transfer.begin(job)
            for source, target in job.pairs:
                if job.direction is STORE:
                    expected_host[target] = expected_device[source]
                else:
                    expected_device[target] = expected_host[source]
        for job_id, done in wait_all(transfer, len(jobs)).items():
            num_pairs = len(jobs[job_id - jobs[0].copy_id].pairs)
            assert (done.failed_pairs, done.checksums, done.message) == ((), (), "")
            assert done.num_bytes == num_pairs * device.layout.block_bytes
            assert done.seconds > 0
        assert torch.equal(device.bytes.cpu(), expected_device)
        assert torch.equal(host.bytes.cpu(), expected_host)
    transfer.close()


def check_audit(copier: BlockCopier) -> None:
    """Store with checksums, spoil one block of the host tier, and load all: that one fails."""
    transfer = KVTransfer(copier, audit=True)
    fill(copier.device.bytes, 1)
    before = copier.device.bytes.cpu().clone()
    transfer.begin(CopyJob(0, STORE, ((0, 3), (2, 1), (3, 0))))
    stored = wait_all(transfer, 1)[0]
    assert len(set(stored.checksums)) == 3
    copier.host.bytes[1, -1] ^= 1
    copier.device.bytes.zero_()
    transfer.begin(CopyJob(1, LOAD, ((3, 0), (1, 2), (0, 3)), stored.checksums))
    loaded = wait_all(transfer, 1)[1]
    assert loaded.failed_pairs == (1,)
    assert loaded.num_bytes == 2 * copier.device.layout.block_bytes
    assert loaded.checksums == ()
    assert "1 blocks came back with another checksum" in loaded.message
    assert torch.equal(copier.device.bytes.cpu()[[0, 3]], before[[0, 3]])
    transfer.close()


class GatedCopier:
    """A copier that tells when it begins, and waits to be let through.

    State: `begun` is set in the first copy; `gate` lets copies through.
    """

    def __init__(self, copier: BlockCopier) -> None:
        """Stand before `copier`, with the gate shut."""
        self.device = copier.device
        self.host = copier.host
        self.begun = Event()
        self.gate = Event()
        self._copier = copier

    def work_so_far(self) -> Callable[[], None]:
        """Return the copier's."""
        return self._copier.work_so_far()

    def copy(self, direction: CopyDirection, pairs: Pairs) -> None:
        """Copy once the gate is open."""
        self.begun.set()
        assert self.gate.wait(PATIENCE_S)
        self._copier.copy(direction, pairs)

    def device_checksum(self, block: int) -> int:
        """Return the copier's."""
        return self._copier.device_checksum(block)
