"""Parts in processes: whatever one of them does, the others run, and nothing is left behind."""

import json
import os
import sys
from collections.abc import Sequence

import psutil
import pytest

from benchmarks.gpu.children import Budget, Children, Findings
from benchmarks.gpu.plan import NAMES, PARTS, Group, Part, runs_of_a_group, with_needs
from benchmarks.gpu.rows import BEGAN, DID_NOT_END
from rillgate_server.core.clock import VirtualClock

_GROUP = Group("things", "", "", start_timeout_s=20.0)
_PRELUDE = """
import json, os, subprocess, sys, time
def say(**message): print(json.dumps(message), flush=True)
say(loaded=1.0)
"""


def _part(name: str, timeout_s: float = 20.0) -> Part:
    return Part(name, _GROUP, "", timeout_s)


class _MakeCommand:
    """Makes commands of Python that do what the parts' scripts say. State: the starts so far."""

    def __init__(self, scripts: dict[str, str], starts: list[list[str]]) -> None:
        self._scripts = scripts
        self._starts = starts

    def __call__(self, parts: Sequence[Part]) -> list[str]:
        names = [part.name for part in parts]
        self._starts.append(names)
        body = [
            f"{self._scripts[name]}\nsay(row=dict(part={name!r}, what='x', samples=[1]))\n"
            f"say(done={name!r})"
            for name in names
        ]
        return [sys.executable, "-c", _PRELUDE + "\n".join(body)]


def _run(
    scripts: dict[str, str], parts: Sequence[Part], budget_s: float = 60.0
) -> tuple[Findings, list[list[str]], int]:
    """Run parts; return what was found, the starts, and how often something changed."""
    findings = Findings()
    starts: list[list[str]] = []
    changes: list[int] = []
    children = Children(
        _MakeCommand(scripts, starts),
        os.environ,
        Budget(budget_s, VirtualClock()),
        findings,
        lambda: changes.append(len(findings.rows)),
    )
    children.run(parts)
    return findings, starts, len(changes)


def test_parts_of_a_group_share_one_process() -> None:
    """And results are written after each of them."""
    findings, starts, changes = _run({"a": "", "b": ""}, [_part("a"), _part("b")])
    assert starts == [["a", "b"]]
    assert [row["part"] for row in findings.rows] == ["a", "b"]
    assert not findings.failed
    assert changes >= 2


def test_part_that_fails_leaves_the_others_a_new_process() -> None:
    """Its reason is kept, its rows so far, too."""
    fails = (
        "say(row=dict(part='b', what='half', samples=[1])); say(failed='no memory'); sys.exit(1)"
    )
    scripts = {"a": "", "b": fails, "c": ""}
    findings, starts, _ = _run(scripts, [_part(name) for name in scripts])
    assert starts == [["a", "b", "c"], ["c"]]
    assert [(row["part"], row["what"]) for row in findings.rows] == [
        ("a", "x"),
        ("b", "half"),
        ("c", "x"),
    ]
    assert findings.failed == {"b": "no memory"}


def test_process_that_dies_is_quoted() -> None:
    """Killed by a signal, or by itself: its last words on standard error say why."""
    dies = "sys.stderr.write('out of everything'); sys.stderr.flush(); os._exit(3)"
    findings, starts, _ = _run({"a": dies, "b": ""}, [_part("a"), _part("b")])
    assert findings.failed == {"a": "its process ended with 3: out of everything"}
    assert starts == [["a", "b"], ["b"]]


def test_part_that_hangs_is_ended_with_its_children() -> None:
    """After its own limit; the next part has a process of its own."""
    hangs = (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "say(row=dict(part='a', what='pid', pid=child.pid, samples=[1]))\n"
        "time.sleep(600)"
    )
    findings, _, _ = _run({"a": hangs, "b": ""}, [_part("a", timeout_s=2.0), _part("b")])
    assert findings.failed == {"a": "took longer than 2 s"}
    assert findings.rows[-1]["part"] == "b"
    pid = findings.rows[0]["pid"]
    gone, alive = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], 10)
    assert not [it for it in alive if it.status() != psutil.STATUS_ZOMBIE], gone


def test_run_that_does_not_end_leaves_how_long_it_took_at_least() -> None:
    """A row that only says when something began becomes a bound."""
    begins = (
        f"say(row=dict(part='a', what={BEGAN!r}, began_s=time.monotonic(), samples=[1]))\n"
        "time.sleep(600)"
    )
    findings, _, _ = _run({"a": begins}, [_part("a", timeout_s=2.0)])
    (row,) = findings.rows
    assert row["what"] == DID_NOT_END
    assert 0.0 < row["seconds_at_least"] <= 5.0


def test_row_that_says_how_it_ended_takes_the_place_of_the_one_before() -> None:
    """Of a run that ended only the end is kept."""
    findings = Findings()
    findings.add({"part": "a", "what": BEGAN, "samples": [1]})
    findings.add({"part": "a", "what": "ran", "samples": [2]})
    findings.close_open_row(5.0)
    assert findings.rows == [{"part": "a", "what": "ran", "samples": [2]}]


def test_what_cannot_be_loaded_is_not_loaded_again_for_each_part() -> None:
    """All parts of the group fail with the reason."""
    findings = Findings()
    changes: list[int] = []
    children = Children(
        lambda _: [sys.executable, "-c", f"print({json.dumps({'failed': 'no file'})!r})"],
        os.environ,
        Budget(60.0, VirtualClock()),
        findings,
        lambda: changes.append(1),
    )
    children.run([_part("a"), _part("b")])
    assert findings.failed == {"a": "no file", "b": "no file"}
    assert changes


def test_parts_are_skipped_once_the_time_is_spent() -> None:
    """They are listed, and no process is started for them."""
    findings, starts, _ = _run({"a": ""}, [_part("a")], budget_s=1.0)
    assert starts == []
    assert findings.skipped == {"a": "no time was left"}


def test_part_gets_no_more_time_than_is_left() -> None:
    """Its own limit is longer than the whole check's."""
    findings, _, _ = _run({"a": "time.sleep(600)"}, [_part("a", timeout_s=500.0)], budget_s=6.0)
    assert findings.failed == {"a": "took longer than 6 s"}


def test_parts_bring_what_they_need_in_order() -> None:
    """The path over the engine alone needs the engine alone, and both need the checkpoint."""
    assert [part.name for part in with_needs(["grpc"])] == ["checkpoint", "requests", "grpc"]
    assert with_needs(NAMES) == list(PARTS)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_needs_come_before_those_who_need_them(part: Part) -> None:
    """Else a part could be measured against nothing."""
    before = NAMES[: NAMES.index(part.name)]
    assert set(part.needs) <= set(before)


def test_group_is_loaded_once_where_its_parts_stand_together() -> None:
    """Each group's parts are neighbours, but those that load nothing."""
    runs = [run[0].group.name for run in runs_of_a_group(PARTS)]
    assert len(runs) == len(set(runs))
