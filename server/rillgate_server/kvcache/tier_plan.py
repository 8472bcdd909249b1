"""What pays: load or recompute, swap or drop, and when a block is worth saving.

Owns the decisions between the tiers and counts them. Does not know the index, pools or copies, nor
how the seconds are fitted (kvcache.cost_model).

    a prompt's chain of known blocks    D D D H H H D H H |  not known
                                              ▲     ▲   ▲
                                        cut candidates: the ends of the runs

Up to the cut everything is used, the host blocks among it loaded; behind it everything is computed,
whatever lies there. A cut in the middle of a run of host blocks is no better than one of the run's
ends: loading costs the same per block, computing more the further back a token is (but for the
fixed cost of one step, where what is left fits into one).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from rillgate_server.core.load import LoadDecisions
from rillgate_server.kvcache.cost_model import CostModel

MAX_STORE_BLOCKS = 64
"""Of one store. With the manager's MAX_STORES it bounds what copies withhold from newcomers."""
PROBE_INTERVAL = 32
"""Every so many times that computing is predicted to pay, a little is loaded all the same: without
loads nobody would see the copies become fast again."""
PROBE_BLOCKS = 4
FIRST_STORE_BLOCKS = 8
"""Of a store while nothing is measured: a host tier that turns out slow withholds no more from
newcomers."""
_DEFAULT_REUSE_THRESHOLD = 2  # while nothing is measured


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """What the operator chose."""

    block_size_tokens: int
    block_bytes: int
    root_hash: bytes
    """Names everything that sharers must share."""
    prefix_caching: bool = True
    load_policy: str = "auto"
    """`auto`, `load` or `recompute` (config.groups.CacheConfig)."""

    @property
    def uses_host_tier(self) -> bool:
        """Whether anything is ever to be read from a host tier."""
        return self.prefix_caching and self.load_policy != "recompute"


@dataclass(frozen=True, slots=True)
class Cut:
    """How much of a chain is used."""

    num_blocks: int
    """Of the chain's beginning."""
    predicted_s: float = 0.0
    """Loading and computing together; 0 where nothing was compared."""


def run_ends(is_on_device: Sequence[bool]) -> list[int]:
    """Return the cuts worth comparing: before each run of host blocks, and the whole chain."""
    num_blocks = len(is_on_device)
    ends = [i for i in range(num_blocks) if not is_on_device[i] and (i == 0 or is_on_device[i - 1])]
    # A cut behind a run of host blocks is never better than one behind the device blocks after it.
    return [*ends, num_blocks]


def cheapest_cut(
    is_on_device: Sequence[bool],
    load_s: Callable[[int], float],
    compute_s: Callable[[int], float],
) -> Cut:
    """Choose the cut after which the prompt is there soonest; of equals the longest.

    load_s: blocks to load -> predicted seconds, 0 for none. compute_s: blocks that are used -> the
    predicted seconds of computing what is behind them.
    """
    best: Cut | None = None
    num_to_load = position = 0
    for end in run_ends(is_on_device):
        num_to_load += is_on_device[position:end].count(False)
        position = end
        seconds = (load_s(num_to_load) if num_to_load else 0.0) + compute_s(end)
        if best is None or seconds <= best.predicted_s:
            best = Cut(end, seconds)
    assert best is not None
    return best


class TierPlan:
    """Decides by predicted seconds.

    State: the counters of its decisions, and when little is to be loaded for the measurement alone.
    """

    def __init__(self, policy: CachePolicy, costs: CostModel) -> None:
        """Decide as `policy` says, by what `costs` predicts."""
        self._policy = policy
        self._costs = costs
        self._num_loads = self._num_recomputes = 0
        self._num_loaded_tokens = self._num_recomputed_tokens = 0
        self._num_swaps = self._num_drops = 0
        self._num_since_probe = 0  # starts that computed what could have been loaded
        self._is_probe = False  # whether the latest cut is one

    def __repr__(self) -> str:
        return f"TierPlan({self.decisions()})"

    # -- load or recompute ------------------------------------------------------------------------

    def choose_cut(
        self,
        is_on_device: Sequence[bool],
        num_tokens: int,
        load_s: Callable[[int], float],
        num_delayed: float = 0.0,
    ) -> int:
        """Return how many blocks of a known chain are used; host blocks among them are loaded.

        `num_tokens`: of the whole sequence. `load_s`: blocks to load -> predicted seconds.
        `num_delayed`: others who wait while this one is computed. A load delays nobody else, so
        what is compared is the delay of all.
        """
        self._is_probe = False
        if all(is_on_device) or self._policy.load_policy == "load":
            return len(is_on_device)
        if not self._policy.uses_host_tier:
            return is_on_device.index(False)
        size, costs = self._policy.block_size_tokens, self._costs
        if not costs.prefill_s(0, size):
            return len(is_on_device)  # nothing to compare with yet
        cut = cheapest_cut(
            is_on_device,
            load_s,
            lambda num_used: (
                (1.0 + num_delayed) * costs.prefill_s(num_used * size, num_tokens - num_used * size)
            ),
        ).num_blocks
        if self._num_since_probe + 1 >= PROBE_INTERVAL and not all(is_on_device[cut:]):
            self._is_probe = True
            first = is_on_device.index(False, cut)
            cut = min(len(is_on_device), first + PROBE_BLOCKS)
        return cut

    def note_start(self, num_loaded_blocks: int, num_left_blocks: int) -> None:
        """Count what came of the latest cut: host blocks loaded, and host blocks computed anew."""
        size = self._policy.block_size_tokens
        self._num_loads += num_loaded_blocks > 0
        self._num_loaded_tokens += num_loaded_blocks * size
        self._num_recomputes += num_left_blocks > 0
        self._num_recomputed_tokens += num_left_blocks * size
        # A probe may load all there is: it ends the count though nothing is left to compute.
        if self._is_probe:
            self._num_since_probe = 0
        else:
            self._num_since_probe += num_left_blocks > 0

    # -- swap or drop -----------------------------------------------------------------------------

    def restart_s(self, num_full_blocks: int, num_tokens: int, *, has_host: bool) -> float:
        """Predict what a preempted sequence costs when it comes back, the cheaper of both ways."""
        compute_s = self._costs.prefill_s(0, num_tokens)
        return min(self._load_s(num_full_blocks), compute_s) if has_host else compute_s

    def choose_swap(self, num_full_blocks: int, num_tokens: int, *, has_host: bool) -> bool:
        """Decide whether a victim's blocks go to the host tier, or are left to be computed anew."""
        compute_s = self._costs.prefill_s(0, num_tokens)
        pays = not compute_s or self._load_s(num_full_blocks) <= compute_s
        is_swap = has_host and (pays or self._policy.load_policy == "load")
        self._num_swaps += is_swap
        self._num_drops += not is_swap
        return is_swap

    # -- saving -----------------------------------------------------------------------------------

    @property
    def saves_pay(self) -> bool:
        """Whether what is saved is worth loading: as predicted, or as the operator wants.

        True while nothing is measured.
        """
        if self._policy.load_policy != "auto":
            return self._policy.uses_host_tier
        compute_s = self._compute_s(MAX_STORE_BLOCKS)
        return not compute_s or self._load_s(MAX_STORE_BLOCKS) <= compute_s

    def max_store_blocks(self) -> int:
        """Return how many blocks one store may have: few while loading does not pay."""
        if self._policy.load_policy != "auto":
            return MAX_STORE_BLOCKS
        if not self._load_s(MAX_STORE_BLOCKS) or not self._compute_s(MAX_STORE_BLOCKS):
            return FIRST_STORE_BLOCKS
        return MAX_STORE_BLOCKS if self.saves_pay else PROBE_BLOCKS

    def reuse_threshold(self) -> int:
        """Return after how many hits saving a block pays at once, though it is in use.

        A block that was hit so often is taken to be hit as often again; evicted unsaved, it would
        be computed once more. So: hits x the cost of computing >= the cost of saving.
        """
        compute_s = self._compute_s(MAX_STORE_BLOCKS)
        store_s = self._costs.store_s(MAX_STORE_BLOCKS * self._policy.block_bytes)
        if not compute_s or not store_s:
            return _DEFAULT_REUSE_THRESHOLD
        return max(1, ceil(store_s / compute_s))

    def _load_s(self, num_blocks: int) -> float:
        return self._costs.load_s(num_blocks * self._policy.block_bytes)

    def _compute_s(self, num_blocks: int) -> float:
        return self._costs.prefill_s(0, num_blocks * self._policy.block_size_tokens)

    def decisions(self) -> LoadDecisions:
        """Return the counters; what loads took is the copies' to say."""
        return LoadDecisions(
            num_loads=self._num_loads,
            num_recomputes=self._num_recomputes,
            num_loaded_tokens=self._num_loaded_tokens,
            num_recomputed_tokens=self._num_recomputed_tokens,
            num_swap_preemptions=self._num_swaps,
            num_recompute_preemptions=self._num_drops,
        )
