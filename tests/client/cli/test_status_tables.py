"""A replica's part of `rillgate status`: what stands there, in 100 columns."""

from dataclasses import replace

import pytest

from rillgate.cli.status_tables import print_replica
from rillgate.status_types import (
    CopyStatus,
    CostStatus,
    DecisionStatus,
    DeviceMemoryStatus,
    QueueStatus,
    ReplicaState,
    ReplicaStatus,
    TierStatus,
)
from rillgate.types import Priority

PLAIN = ReplicaStatus(
    replica_id="replica-0",
    incarnation=1,
    model="demo",
    model_version="v",
    state=ReplicaState.READY,
    num_running=2,
    num_waiting=4,
    num_running_tokens=900,
    num_waiting_tokens=312,
    step_id=9,
    step_age_ms=1.0,
    prefill_tokens_per_s=5120.4,
    decode_step_ms=12.06,
    device=TierStatus(512, 12, 300, 200, 0, 4096, 7),
    block_size_tokens=16,
    num_preemptions=3,
    num_cached_tokens=61,
    num_prompt_tokens=100,
)
FULL = replace(
    PLAIN,
    num_loading=1,
    host=TierStatus(1024, 900, 0, 120, 4, 512, 8),
    copies=CopyStatus(40, 3 << 30, 20, 5 << 20, 1, 2, 6),
    decisions=DecisionStatus(12, 3, 3400, 120, 0.7, 0.8, 2, 1),
    costs=CostStatus(0.0012, 31e-6, 2.1e-9, 150e-6, 0, 4e-4, 3 << 30, 5e-4, 2 << 20),
    queues=(
        QueueStatus(Priority.HIGH, "acme", 3, 300),
        QueueStatus(Priority.LOW, "", 1, 12),
    ),
)


def printed(replica: ReplicaStatus, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Print, and return the lines."""
    print_replica(replica)
    return capsys.readouterr().out.splitlines()


def test_a_replica_with_two_tiers_shows_all_that_operators_ask(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Batch, preemption by kind, both tiers, decisions, copies, the queue and the fitted costs."""
    assert printed(FULL, capsys) == [
        "replica-0  demo  ready",
        "2 running, 1 loading, 4 waiting (312 tokens); prefill 5120 tokens/s, decode step 12.1 ms",
        "prompt tokens from the cache: 61 %; preempted: 3 (2 by swap, 1 by recompute)",
        "tier    blocks  free  used  cached  in flight  hit tokens  evicted  moved in",
        "device     512    12   300     200          0        4096        7  5.0 MiB",
        "host      1024   900     0     120          4         512        8  3.0 GiB",
        "host hits: 12 loaded (3400 tokens in 0.80 s, predicted 0.70 s), 3 recomputed (120 tokens)",
        "blocks: 40 to host, 20 to device, 1 failed, 2 refused by checksum, 6 evicted unsaved",
        "queue  tenant  requests  tokens",
        "high   acme           3     300",
        "low    (none)         1      12",
        "cost           fixed      each       per context token",
        "step           1.20 ms    -          -",
        "prefill token  -          31.00 us   2.10 ns",
        "decode row     -          150.00 us  0",
        "load           400.00 us  3.0 GiB/s  -",
        "store          500.00 us  2.0 MiB/s  -",
    ]


def test_a_replica_without_a_host_tier_shows_none_of_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No rows of zeros for what is not there, nor for what was not measured yet."""
    lines = printed(replace(PLAIN, prefill_tokens_per_s=0.0, num_prompt_tokens=0), capsys)
    assert lines[1].endswith("prefill - tokens/s, decode step 12.1 ms")
    assert lines[2].startswith("prompt tokens from the cache: -;")
    assert not [line for line in lines if line.startswith(("host", "queue", "cost", "blocks:"))]


def test_the_gateways_side_of_a_replica_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Where it is, what runs there, over how many ranks, and why it is not used."""
    placed = replace(
        PLAIN,
        state=ReplicaState.FROZEN,
        address="10.0.0.2:7000",
        num_streams=3,
        num_announced_blocks=77,
        tensor_parallel_size=2,
        set_aside="it has another tokenizer",
    )
    assert printed(placed, capsys)[:3] == [
        "replica-0  demo  2 ranks  frozen",
        "at 10.0.0.2:7000: 3 streams, 77 blocks announced",
        "not used: it has another tokenizer",
    ]


def test_drafts_are_shown_once_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    """How many, and how many were right."""
    drafting = replace(PLAIN, num_drafted_tokens=80, num_accepted_tokens=20)
    assert "drafts: 80, 20 accepted (25 %)" in printed(drafting, capsys)
    assert not [line for line in printed(PLAIN, capsys) if line.startswith("drafts")]


def test_the_devices_idle_time_is_shown_where_it_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is what a step could have been shorter by; a CPU says nothing of it."""
    idle = replace(PLAIN, device_idle_ms_per_step=0.3561, num_following_steps=4711)
    expected = "device idle before a step: 0.36 ms (4711 steps followed another)"
    assert expected in printed(idle, capsys)
    assert not [line for line in printed(PLAIN, capsys) if "idle" in line]


def test_a_gpus_memory_is_shown_with_its_fragments(capsys: pytest.CaptureFixture[str]) -> None:
    """What is reserved and not allocated."""
    gib = 2**30
    memory = DeviceMemoryStatus(140 * gib, 100 * gib, 101 * gib + gib // 2, 104 * gib)
    expected = "device memory: 100.00 of 140.00 GiB, 104.00 at most, 1.50 reserved but unused"
    assert expected in printed(replace(PLAIN, device_memory=memory), capsys)
    assert not [line for line in printed(PLAIN, capsys) if "memory" in line]


def test_every_line_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """With large numbers, too."""
    large = TierStatus(10**7, 10**7, 10**7, 10**7, 10**7, 10**9, 10**6)
    lines = printed(replace(FULL, device=large, host=large), capsys)
    assert max(map(len, lines)) <= 100


def test_a_tenants_name_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters are taken out."""
    replica = replace(FULL, queues=(QueueStatus(Priority.LOW, "a\x1b[2J", 1, 1),))
    assert not [line for line in printed(replica, capsys) if "\x1b" in line]


def test_a_host_tier_that_could_not_be_pinned_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """An operator who finds copies slow sees why."""
    lines = printed(replace(FULL, host=replace(FULL.host, num_blocks_pageable=1024)), capsys)
    said = [line for line in lines if "not pinned" in line]
    assert said == [
        "blocks: 40 to host, 20 to device, 1 failed, 2 refused by checksum, 6 evicted unsaved; "
        "1024 host blocks are not pinned, their copies are slow"
    ]
