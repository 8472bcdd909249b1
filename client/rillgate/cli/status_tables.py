"""One replica's part of `rillgate status`: a few lines and tables that fit a terminal's width.

Owns which number stands where, and in which unit. Knows nothing of flags.
"""

from collections.abc import Sequence

from rillgate.cli.terminal import print_table, printable
from rillgate.status_types import CostStatus, ReplicaStatus, TierStatus


def print_replica(replica: ReplicaStatus) -> None:
    """Print one replica: what it does, its cache by tier, its queue, what things cost."""
    for line in (
        _identity(replica),
        *_place(replica),
        _batch(replica),
        _preemptions(replica),
        *_speculation(replica),
        *_device_idle(replica),
        *_device_memory(replica),
    ):
        print(printable(line))
    print_table(_TIER_HEADERS, _tier_rows(replica))
    if replica.host.num_blocks:
        print(_decisions(replica))
        print(_copies(replica))
    if replica.queues:
        print_table(("queue", "tenant", "requests", "tokens"), _queue_rows(replica))
    if replica.costs.step_s:
        print_table(("cost", "fixed", "each", "per context token"), _cost_rows(replica.costs))


def _identity(replica: ReplicaStatus) -> str:
    ranks = replica.tensor_parallel_size
    split = f"  {ranks} ranks" if ranks > 1 else ""
    return f"{replica.replica_id}  {replica.model}{split}  {replica.state.value}"


def _place(replica: ReplicaStatus) -> Sequence[str]:
    """Say what the gateway has to do with it."""
    lines = []
    if replica.address:
        lines.append(
            f"at {replica.address}: {replica.num_streams} streams, "
            f"{replica.num_announced_blocks} blocks announced"
        )
    if replica.set_aside:
        lines.append(f"not used: {replica.set_aside}")
    return lines


def _batch(replica: ReplicaStatus) -> str:
    loading = f"{replica.num_loading} loading, " if replica.host.num_blocks else ""
    rate = f"{replica.prefill_tokens_per_s:.0f}" if replica.prefill_tokens_per_s else "-"
    step = f"{replica.decode_step_ms:.1f}" if replica.decode_step_ms else "-"
    return (
        f"{replica.num_running} running, {loading}{replica.num_waiting} waiting "
        f"({replica.num_waiting_tokens} tokens); prefill {rate} tokens/s, decode step {step} ms"
    )


def _preemptions(replica: ReplicaStatus) -> str:
    prompt, decisions = replica.num_prompt_tokens, replica.decisions
    share = f"{100 * replica.num_cached_tokens / prompt:.0f} %" if prompt else "-"
    return (
        f"prompt tokens from the cache: {share}; preempted: {replica.num_preemptions} "
        f"({decisions.num_swap_preemptions} by swap, "
        f"{decisions.num_recompute_preemptions} by recompute)"
    )


def _speculation(replica: ReplicaStatus) -> Sequence[str]:
    """Say how many drafts were right, once there were any."""
    drafted, accepted = replica.num_drafted_tokens, replica.num_accepted_tokens
    if not drafted:
        return ()
    return (f"drafts: {drafted}, {accepted} accepted ({100 * accepted / drafted:.0f} %)",)


def _device_idle(replica: ReplicaStatus) -> Sequence[str]:
    """Say how long the device waits for the host, where that is measured."""
    if not replica.device_idle_ms_per_step:
        return ()
    return (
        f"device idle before a step: {replica.device_idle_ms_per_step:.2f} ms "
        f"({replica.num_following_steps} steps followed another)",
    )


def _device_memory(replica: ReplicaStatus) -> Sequence[str]:
    """Say how a GPU's memory is used."""
    memory = replica.device_memory
    if memory is None:
        return ()
    used, peak, total = (
        f"{num_bytes / 2**30:.2f}"
        for num_bytes in (memory.allocated_bytes, memory.peak_bytes, memory.total_bytes)
    )
    fragments = (memory.reserved_bytes - memory.allocated_bytes) / 2**30
    unused = f"{fragments:.2f} reserved but unused"
    return (f"device memory: {used} of {total} GiB, {peak} at most, {unused}",)


_TIER_HEADERS = (
    "tier",
    "blocks",
    "free",
    "used",
    "cached",
    "in flight",
    "hit tokens",
    "evicted",
    "moved in",
)


def _tier_rows(replica: ReplicaStatus) -> Sequence[Sequence[str]]:
    copies = replica.copies
    rows = [_tier_row("device", replica.device, copies.num_loaded_bytes)]
    if replica.host.num_blocks:
        rows.append(_tier_row("host", replica.host, copies.num_stored_bytes))
    return rows


def _tier_row(name: str, tier: TierStatus, num_bytes_in: int) -> tuple[str, ...]:
    return (
        name,
        str(tier.num_blocks),
        str(tier.num_blocks_free),
        str(tier.num_blocks_used),
        str(tier.num_blocks_cached),
        str(tier.num_blocks_copying),
        str(tier.num_hit_tokens),
        str(tier.num_evicted_blocks),
        _size(num_bytes_in),
    )


def _decisions(replica: ReplicaStatus) -> str:
    it = replica.decisions
    return (
        f"host hits: {it.num_loads} loaded ({it.num_loaded_tokens} tokens in "
        f"{it.actual_load_s:.2f} s, predicted {it.predicted_load_s:.2f} s), "
        f"{it.num_recomputes} recomputed ({it.num_recomputed_tokens} tokens)"
    )


def _copies(replica: ReplicaStatus) -> str:
    it = replica.copies
    return (
        f"blocks: {it.num_stored_blocks} to host, {it.num_loaded_blocks} to device, "
        f"{it.num_failed_blocks} failed, {it.num_refused_blocks} refused by checksum, "
        f"{it.num_unsaved_blocks} evicted unsaved{_pageable(replica.host)}"
    )


def _pageable(host: TierStatus) -> str:
    """Warn where the host tier could not be pinned."""
    num_blocks = host.num_blocks_pageable
    return f"; {num_blocks} host blocks are not pinned, their copies are slow" if num_blocks else ""


def _queue_rows(replica: ReplicaStatus) -> Sequence[Sequence[str]]:
    return [
        (it.priority.value, it.tenant or "(none)", str(it.num_requests), str(it.num_tokens))
        for it in replica.queues
    ]


def _cost_rows(costs: CostStatus) -> Sequence[Sequence[str]]:
    context = (_time(costs.prefill_context_s), _time(costs.decode_context_s))
    rows = [
        ("step", _time(costs.step_s), "-", "-"),
        ("prefill token", "-", _time(costs.prefill_token_s), context[0]),
        ("decode row", "-", _time(costs.decode_row_s), context[1]),
    ]
    for name, latency_s, rate in (
        ("load", costs.load_latency_s, costs.load_bytes_per_s),
        ("store", costs.store_latency_s, costs.store_bytes_per_s),
    ):
        if rate:
            rows.append((name, _time(latency_s), f"{_size(rate)}/s", "-"))
    return rows


def _time(seconds: float) -> str:
    """Write a time in the unit that leaves one to three digits before the point."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1.0:
            return f"{seconds * factor:.2f} {unit}"
    return f"{seconds * 1e9:.2f} ns" if seconds else "0"


def _size(num_bytes: float) -> str:
    """Write a size in the largest binary unit that it fills."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} B"
