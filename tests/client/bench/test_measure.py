"""The measuring itself, against a fake server whose delays are known."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rillgate._channel import ChannelPlan, plan_channel
from rillgate.bench.measure import Series, measure
from rillgate.bench.plot import draw_png
from rillgate.bench.summary import summarize
from rillgate.bench.workload import BenchRequest
from rillgate.config import ClientConfig
from rillgate.testing import FakeError, FakeReply, FakeServer

_FIRST_S, _INTERVAL_S = 0.05, 0.004
_SLOW = FakeReply("x", first_token_delay_s=_FIRST_S, token_interval_s=_INTERVAL_S)
_REQUEST = BenchRequest((1, 2, 3), max_tokens=20, ignore_eos=True)


def _plan(server: FakeServer) -> ChannelPlan:
    return plan_channel(server.target, ClientConfig())


async def test_measured_times_hold_the_servers_delays(server: FakeServer) -> None:
    """No time is shorter than what the server slept, and most are not far above.

    A timer never wakes early, so the lower bounds are exact; the upper ones leave room for a
    machine that is busy with something else.
    """
    server.reply(*[_SLOW] * 8)
    samples = await measure(_plan(server), Series([_REQUEST] * 8, max_concurrency=4))
    row = summarize("4", samples)
    assert [sample.num_output_tokens for sample in samples] == [20] * 8
    assert [sample.num_prompt_tokens for sample in samples] == [3] * 8
    assert row.ttft_ms.median >= 1000 * _FIRST_S
    assert row.tpot_ms.median >= 1000 * _INTERVAL_S * 0.9  # a message may wait for its neighbour
    assert row.ttft_ms.median < 10 * 1000 * _FIRST_S
    assert row.tpot_ms.median < 10 * 1000 * _INTERVAL_S
    assert row.duration_s >= 2 * (_FIRST_S + 19 * _INTERVAL_S)  # two rounds of four
    assert row.output_tokens_per_s == pytest.approx(160 / row.duration_s)


async def test_tokens_are_counted_by_ids_however_many_a_message_holds() -> None:
    """A message with seven tokens counts seven."""
    with FakeServer(tokens_per_message=7) as server:
        (sample,) = await measure(_plan(server), Series([_REQUEST], max_concurrency=1))
    assert sample.num_output_tokens == 20


async def test_no_more_requests_are_open_than_asked(server: FakeServer) -> None:
    """A free place is taken at once, and never more than there are."""
    most_open = 0

    def look() -> None:
        nonlocal most_open
        most_open = max(most_open, server.num_open)

    server.reply(*[FakeReply("abc", first_token_delay_s=0.01)] * 12)
    series = Series([BenchRequest("p", 3, False)] * 12, max_concurrency=3)
    samples = await measure(_plan(server), series, look)
    assert len(samples) == 12
    assert most_open <= 3
    overlaps = [
        sum(other.sent_s <= one.sent_s < (other.last_token_s or 0) for other in samples)
        for one in samples
    ]
    assert max(overlaps) == 3


async def test_requests_go_at_their_arrival_times(server: FakeServer) -> None:
    """Open loop: none before its time, and none waits for another's end."""
    server.reply(*[_SLOW] * 4)
    arrivals = [0.0, 0.02, 0.04, 0.06]
    series = Series([_REQUEST] * 4, max_concurrency=None, arrivals_s=arrivals)
    samples = await measure(_plan(server), series)
    assert all(s.sent_s >= at for s, at in zip(samples, arrivals, strict=True))
    assert samples[3].sent_s < (samples[0].last_token_s or 0.0)


async def test_every_request_carries_the_deadline(server: FakeServer) -> None:
    """A server that schedules by deadlines is measured with them; one that hangs is left."""
    server.reply(FakeReply("abc", hold_after=1))
    series = Series([BenchRequest("p", 3, False)], max_concurrency=1, timeout_s=0.3)
    (sample,) = await measure(_plan(server), series)
    assert sample.error.startswith("DEADLINE_EXCEEDED")
    assert sample.num_output_tokens == 1


async def test_a_refusal_is_a_sample_and_is_not_tried_again(server: FakeServer) -> None:
    """Errors and what came before them are recorded; cache hits and preemptions too."""
    server.reply(
        FakeError("RESOURCE_EXHAUSTED", "full", retry_after_s=0.001),
        FakeReply("abc", fail_after=2),
        FakeReply("abc", num_cached_tokens=16, num_preemptions=2),
    )
    series = Series([BenchRequest("p", 3, False)] * 3, max_concurrency=1)
    refused, broken, good = await measure(_plan(server), series)
    assert (refused.error, refused.num_output_tokens) == ("RESOURCE_EXHAUSTED: full", 0)
    assert refused.first_token_s is None
    assert broken.error.startswith("UNAVAILABLE")
    assert broken.num_output_tokens == 2
    assert (good.num_cached_tokens, good.num_preemptions, good.error) == (16, 2, "")
    assert len(server.requests) == 3


def test_the_command_prints_rows_and_writes_json_and_png(
    server: FakeServer, tmp_path: Path
) -> None:
    """One row per concurrency; every prompt is of its own and has the length asked."""
    report, plot = tmp_path / "report.json", tmp_path / "plot.png"
    done = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "rillgate"), "bench", "--target", server.target),
            *("--concurrency", "1,3", "--num-requests", "5", "--prompt-tokens", "32"),
            *("--output-tokens", "6", "--json", str(report), "--plot", str(plot)),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert "out tok/s" in header
    assert [line.split()[:3] for line in lines] == [["1", "5", "0"], ["3", "5", "0"]]
    rows = json.loads(report.read_text())["rows"]
    assert [(row["label"], row["output_tokens"]) for row in rows] == [("1", 30), ("3", 30)]
    assert [len(row["samples"]) for row in rows] == [5, 5]
    assert plot.read_bytes().startswith(b"\x89PNG")
    prompts = [request.token_ids for request in server.requests]
    assert {len(prompt) for prompt in prompts} == {32}
    assert len(set(prompts)) == len(prompts) == 1 + 5 + 5  # one warms up


def test_a_plot_is_drawn_of_rows_without_numbers_too() -> None:
    """A series in which everything failed does not break the picture of the others."""
    assert draw_png([summarize("1", [])], "concurrency").startswith(b"\x89PNG")


def test_a_datasets_requests_are_each_sent_once_and_none_warms_up(
    server: FakeServer, tmp_path: Path
) -> None:
    """A prompt that had warmed up the server would find itself in the cache."""
    dataset = tmp_path / "data.jsonl"
    dataset.write_text("".join(f'{{"prompt": "question {i}"}}\n' for i in range(5)))
    command = [str(Path(sys.executable).parent / "rillgate"), "bench", "--concurrency", "2"]
    done = subprocess.run(
        [*command, "--target", server.target, "--dataset", str(dataset)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    warmup, *measured = server.requests
    assert warmup.token_ids
    assert sorted(str(request.prompt) for request in measured) == [
        f"question {i}" for i in range(5)
    ]
    assert all(request.options == {"max_tokens": 64} for request in measured)
