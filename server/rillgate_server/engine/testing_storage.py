"""Two tiers of blocks without tensors, and the copies between them, for `engine.testing`.

Owns what every block holds and which copies are in flight, and refuses whatever a real machine
would only answer wrongly to: a read or write of a block that a copy is filling, a write to a block
that a copy reads. Does not know plans, slots or models.

    DEVICE_TO_HOST   begin                         end
        source       | nobody writes it            |
        target       | nobody reads or writes it   | holds what the source holds
    HOST_TO_DEVICE   begin                         end
        source       | nobody writes it            |
        target       | poison                      | holds what the source holds, or poison

A copy begun within a step is in flight while the step computes, however short it is.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from rillgate_server.core.step import CopyDirection, CopyDone, CopyJob

Cell = tuple[int, int]
"""What a place of a block holds: (token id, digest of all tokens up to it)."""

_POISON: Cell = (-1, -1)
"""What no token ever leaves behind."""


class CacheMismatch(AssertionError):
    """The blocks of a slot do not hold its tokens, or a plan contradicts what is set up."""


@dataclass(frozen=True, slots=True)
class FakeCopies:
    """The host tier of a FakeExecutor, and how its copies go."""

    num_host_blocks: int = 0
    copy_steps: Callable[[CopyJob], int] = lambda job: 0
    """Whole steps after the one that begins a copy, until it ends; 0: reported by that one."""
    fail_copies: Callable[[CopyJob], tuple[int, ...]] = lambda job: ()
    """Which of a job's pairs fail."""
    audit: bool = False
    """Gives checksums of what goes out, and wants them for what comes in."""
    block_bytes: int = 1024
    seconds_per_block: float = 0.0
    """What a copy reports that it took."""


@dataclass(slots=True)
class _Flight:
    """A copy that has begun."""

    job: CopyJob
    num_steps_left: int


@dataclass(slots=True)
class _Tier:
    """One tier's blocks, and how many copies in flight read or fill each."""

    name: str
    cells: list[list[Cell | None]]
    """block -> what each place holds; None where nothing was written yet."""
    sources: Counter[int] = field(default_factory=Counter)
    targets: set[int] = field(default_factory=set)

    def check_block(self, block: int) -> None:
        if not 0 <= block < len(self.cells):
            raise CacheMismatch(f"the {self.name} tier has no block {block}")

    def check_readable(self, block: int) -> None:
        self.check_block(block)
        if block in self.targets:
            raise CacheMismatch(f"{self.name} block {block} is read while a copy fills it")

    def check_writable(self, block: int) -> None:
        self.check_block(block)
        if block in self.targets:
            raise CacheMismatch(f"{self.name} block {block} is written while a copy fills it")
        if self.sources[block]:
            raise CacheMismatch(f"{self.name} block {block} is written while a copy reads it")


class FakeStorage:
    """The blocks of both tiers and the copies in flight.

    State: the two tiers, the copies in flight by their id, the latest id.
    """

    def __init__(self, num_blocks: int, block_size_tokens: int, copies: FakeCopies) -> None:
        """Start with empty blocks and no copy in flight."""
        self._copies = copies
        self._device = _Tier("device", [[None] * block_size_tokens for _ in range(num_blocks)])
        self._host = _Tier(
            "host", [[None] * block_size_tokens for _ in range(copies.num_host_blocks)]
        )
        self._flights: dict[int, _Flight] = {}  # copy id -> the copy
        self._latest_id: int | None = None

    def __repr__(self) -> str:
        return f"FakeStorage(in_flight={sorted(self._flights)})"

    @property
    def num_in_flight(self) -> int:
        """Copies that have begun and were not reported."""
        return len(self._flights)

    def read(self, block: int, place: int) -> Cell | None:
        """Return what a place of a device block holds; raises CacheMismatch while it is filled."""
        self._device.check_readable(block)
        return self._device.cells[block][place]

    def write(self, block: int, place: int, cell: Cell) -> None:
        """Fill a place of a device block; raises CacheMismatch while a copy owns the block."""
        self._device.check_writable(block)
        self._device.cells[block][place] = cell

    def check_named(self, block: int) -> None:
        """Raise CacheMismatch for a block that no block table may name now."""
        self._device.check_readable(block)

    def corrupt(self, host_block: int) -> None:
        """Change what a host block holds behind everybody's back, as a broken memory would."""
        cells = self._host.cells[host_block]
        cells[:] = [_POISON if cell is None else (cell[0] ^ 1, cell[1] ^ 1) for cell in cells]

    def begin(self, job: CopyJob) -> None:
        """Begin a copy; raises CacheMismatch where it meets another one, or is not well formed."""
        if self._latest_id is not None and job.copy_id != self._latest_id + 1:
            raise CacheMismatch(f"copy {job.copy_id} follows copy {self._latest_id}")
        if not job.pairs:
            raise CacheMismatch(f"copy {job.copy_id} has no pairs")
        is_load = job.direction is CopyDirection.HOST_TO_DEVICE
        num_checksums = None if job.checksums is None else len(job.checksums)
        if num_checksums != (len(job.pairs) if is_load and self._copies.audit else None):
            raise CacheMismatch(f"copy {job.copy_id} has {num_checksums} checksums: {job}")
        source_tier, target_tier = self._tiers_of(job)
        for source, target in job.pairs:
            source_tier.check_readable(source)
            target_tier.check_writable(target)
            source_tier.sources[source] += 1
            target_tier.targets.add(target)
            if is_load:
                _poison(target_tier.cells[target])
        self._latest_id = job.copy_id
        self._flights[job.copy_id] = _Flight(job, self._copies.copy_steps(job))

    def step_done(self) -> tuple[CopyDone, ...]:
        """Let a step's time pass for all copies; end and report those that are through."""
        ended = [flight.job for flight in self._flights.values() if flight.num_steps_left <= 0]
        for flight in self._flights.values():
            flight.num_steps_left -= 1
        return tuple(map(self._end, ended))

    def _end(self, job: CopyJob) -> CopyDone:
        del self._flights[job.copy_id]
        failed = set(self._copies.fail_copies(job))
        source_tier, target_tier = self._tiers_of(job)
        checksums = [_checksum(source_tier.cells[source]) for source, _ in job.pairs]
        refused: set[int] = set()
        if job.checksums is not None:
            wanted = enumerate(zip(checksums, job.checksums, strict=True))
            refused = {i for i, (found, expected) in wanted if found != expected} - failed
        failed |= refused
        for i, (source, target) in enumerate(job.pairs):
            source_tier.sources[source] -= 1
            target_tier.targets.remove(target)
            if i in failed:
                _poison(target_tier.cells[target])
            else:
                target_tier.cells[target][:] = source_tier.cells[source]
        is_store = job.direction is CopyDirection.DEVICE_TO_HOST
        return CopyDone(
            job.copy_id,
            tuple(sorted(failed)),
            (len(job.pairs) - len(failed)) * self._copies.block_bytes,
            len(job.pairs) * self._copies.seconds_per_block,
            tuple(checksums) if is_store and self._copies.audit else (),
            f"{len(failed)} blocks did not arrive" if failed else "",
            num_refused=len(refused),
        )

    def _tiers_of(self, job: CopyJob) -> tuple[_Tier, _Tier]:
        """Return (the tier of its sources, the tier of its targets)."""
        if job.direction is CopyDirection.DEVICE_TO_HOST:
            return self._device, self._host
        return self._host, self._device


def _poison(cells: list[Cell | None]) -> None:
    cells[:] = [_POISON] * len(cells)


def _checksum(cells: list[Cell | None]) -> int:
    return hash(tuple(cells)) & 0xFFFFFFFF
