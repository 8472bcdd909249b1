"""The supervisor over small real processes."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rillgate_server.replica.child import EXIT_FROZEN, EXIT_OPERATOR, ChildSpec
from rillgate_server.replica.group import GroupSpec
from rillgate_server.replica.restarts import RestartPolicy
from rillgate_server.replica.supervisor import EXIT_KILLED, Supervisor

DEADLINE_S = 20.0
"""For what takes tens of milliseconds; the machine may be busy."""
POLICY = RestartPolicy(first_delay_s=0.01, longest_delay_s=0.02, max_quick_crashes=3)

SERVES = """
    import os, signal, sys, pathlib
    log = pathlib.Path(sys.argv[1])
    def write(word):
        with log.open("a") as file:
            file.write(f"{word} {os.getpid()}\\n")
        with log.with_name("log.txt").open("a") as file:  # everybody's, in order
            file.write(f"{log.stem} {word}\\n")
    def end(number, frame):
        write("stopped")
        sys.exit(0)
    signal.signal(signal.SIGTERM, end)
    write("started")
    print("PROGRESS 1 2", flush=True)
    print("READY", log.stem, flush=True)
    while True:
        signal.pause()
"""
DEAF = SERVES.replace(
    "signal.signal(signal.SIGTERM, end)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
)
CRASHES = """
    import sys
    print("first line", file=sys.stderr)
    print("out of luck", file=sys.stderr)
    sys.exit(7)
"""
REFUSES = """
    import sys
    print("rillgate: no such checkpoint", file=sys.stderr)
    sys.exit(2)
"""


CRASHES_ONCE = SERVES.replace(
    'write("started")',
    """
    write("started")
    if log.read_text().count("started") == 1:
        sys.exit(7)
    """.strip(),
)


class Stage:
    """A supervisor under test, its children's log, and what it said."""

    def __init__(
        self,
        directory: Path,
        gateway: str,
        *replicas: tuple[str, ...],
        policy: RestartPolicy = POLICY,
    ) -> None:
        """Make a child per script: the gateway, and per replica its ranks."""
        self.log = directory / "log.txt"
        self.log.touch()
        self.said: list[str] = []
        self.progress: list[tuple[int, int]] = []
        self.texts: dict[str, str] = {}
        self.ready = asyncio.Event()
        self.num_announced = 0
        self.num_fresh = 0
        self.directory = directory
        names = ["replica"] if len(replicas) == 1 else [f"replica-{i}" for i in range(256)]
        self.supervisor = Supervisor(
            self._group("gateway", (gateway,)),
            [self._group(*named) for named in zip(names, replicas, strict=False)],
            policy,
            self._note_ready,
            self.said.append,
            lambda done, total: self.progress.append((done, total)),
        )

    def _group(self, name: str, scripts: tuple[str, ...]) -> GroupSpec:
        children = []
        for rank, script in enumerate(scripts):
            child = name if len(scripts) == 1 else f"{name}-rank-{rank}"
            path = self.directory / f"{child}.py"
            path.write_text(textwrap.dedent(script))
            log = self.directory / f"{child}.log"
            log.touch()
            command = (sys.executable, str(path), str(log))
            children.append(ChildSpec(child, command, stop_grace_s=0.3))
        return GroupSpec(name, tuple(children), self._fresh)

    def _fresh(self) -> dict[str, str]:
        self.num_fresh += 1
        return {"FRESH": str(self.num_fresh)}

    def _note_ready(self, texts: dict[str, str]) -> None:
        self.texts = texts
        self.num_announced += 1
        self.ready.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the supervisor while the block does, and stop it; it must end clean."""
        running = asyncio.create_task(self.supervisor.run())
        try:
            yield
        finally:
            self.supervisor.request_stop()
            assert await finish(running) == 0

    async def becomes_ready(self) -> None:
        """Wait for the announcement."""
        await asyncio.wait_for(self.ready.wait(), DEADLINE_S)

    def lines(self, name: str) -> list[tuple[str, int]]:
        """Return (word, pid) per line of a child's log."""
        lines = (self.directory / f"{name}.log").read_text().splitlines()
        return [(word, int(pid)) for word, pid in map(str.split, lines)]


async def wait_until(condition: Callable[[], bool]) -> None:
    """Poll across a process border, where there is no event to wait on."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - no event crosses
            await asyncio.sleep(0.01)


async def finish(task: "asyncio.Task[int]") -> int:
    """Wait for a supervisor's exit code."""
    return await asyncio.wait_for(task, DEADLINE_S)


async def test_children_start_say_ready_and_stop_in_reverse_order(tmp_path: Path) -> None:
    """Ready comes when both are; a stop ends the gateway first, and all exit clean."""
    stage = Stage(tmp_path, SERVES, (SERVES,))
    running = asyncio.create_task(stage.supervisor.run())
    await asyncio.wait_for(stage.ready.wait(), DEADLINE_S)
    stage.supervisor.request_stop()
    assert await finish(running) == 0
    (_, gateway_pid), (word, _) = stage.lines("gateway")
    assert word == "stopped"
    assert [word for word, _ in stage.lines("replica")] == ["started", "stopped"]
    # Not the files' times: those tick in milliseconds, and both can end within one.
    assert stage.log.read_text().splitlines()[-2:] == ["gateway stopped", "replica stopped"]
    assert not psutil.pid_exists(gateway_pid)
    assert stage.said == []
    assert stage.texts == {"replica": "replica", "gateway": "gateway"}
    assert stage.progress == [(1, 2), (2, 4)]


async def test_a_killed_child_is_started_again_and_the_other_goes_on(tmp_path: Path) -> None:
    """kill -9 of the replica gives a new replica; the gateway keeps its process."""
    stage = Stage(tmp_path, SERVES, (SERVES,))
    running = asyncio.create_task(stage.supervisor.run())
    await asyncio.wait_for(stage.ready.wait(), DEADLINE_S)
    first_pid = stage.lines("replica")[0][1]
    os.kill(first_pid, signal.SIGKILL)
    await wait_until(lambda: len(stage.lines("replica")) == 2)
    await wait_until(lambda: any("serves again" in line for line in stage.said))
    stage.supervisor.request_stop()
    assert await finish(running) == 0
    assert stage.lines("replica")[1][1] != first_pid
    assert [word for word, _ in stage.lines("gateway")] == ["started", "stopped"]
    assert "killed by SIGKILL" in stage.said[0]


async def test_quick_crashes_end_in_giving_up_with_the_last_lines(tmp_path: Path) -> None:
    """After three quick crashes in a row the reason and the child's stderr are said; exit 1."""
    stage = Stage(tmp_path, SERVES, (CRASHES,))
    assert await finish(asyncio.create_task(stage.supervisor.run())) == 1
    assert len([line for line in stage.said if "starting it again" in line]) == 2
    assert "died 3 times" in stage.said[-1]
    assert "exit code 7" in stage.said[-1]
    assert "out of luck" in stage.said[-1]
    assert [pid for _, pid in stage.lines("gateway") if psutil.pid_exists(pid)] == []


async def test_an_operator_s_mistake_is_not_tried_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 ends the supervisor with 2; the child's line stands alone."""
    stage = Stage(tmp_path, SERVES, (REFUSES,))
    assert await finish(asyncio.create_task(stage.supervisor.run())) == EXIT_OPERATOR
    assert stage.said == []
    assert capfd.readouterr().err == "rillgate: no such checkpoint\n"


async def test_a_child_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    """Stopping takes the grace, not for ever, and says so."""
    stage = Stage(tmp_path, SERVES, (DEAF,))
    running = asyncio.create_task(stage.supervisor.run())
    await asyncio.wait_for(stage.ready.wait(), DEADLINE_S)
    stage.supervisor.request_stop()
    assert await finish(running) == 0
    assert "did not stop within" in stage.said[-1]


async def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    """Asked twice, the supervisor waits for no grace."""
    stage = Stage(tmp_path, SERVES, (DEAF,))
    running = asyncio.create_task(stage.supervisor.run())
    await asyncio.wait_for(stage.ready.wait(), DEADLINE_S)
    stage.supervisor.request_stop()
    stage.supervisor.request_stop()
    assert await finish(running) == EXIT_KILLED


async def test_ranks_of_a_replica_end_and_start_together(tmp_path: Path) -> None:
    """kill -9 of one rank takes the other, and both come back with what is fresh for each start."""
    stage = Stage(tmp_path, SERVES, (SERVES, SERVES))
    async with stage.running():
        await stage.becomes_ready()
        assert stage.texts == {"gateway": "gateway", "replica": "replica-rank-0"}
        ranks = ("replica-rank-0", "replica-rank-1")
        await wait_until(lambda: bool(stage.lines(ranks[1])))
        first_pids = [stage.lines(rank)[0][1] for rank in ranks]
        fresh = {psutil.Process(pid).environ()["FRESH"] for pid in first_pids}
        assert len(fresh) == 1
        os.kill(first_pids[1], signal.SIGKILL)
        await wait_until(lambda: all(len(stage.lines(rank)) == 2 for rank in ranks))
        assert not any(map(_lives, first_pids))
        pids = [stage.lines(rank)[1][1] for rank in ranks]
        assert {psutil.Process(pid).environ()["FRESH"] for pid in pids} == {"3"} != fresh
    assert stage.said[0].startswith("replica-rank-1 died (killed by SIGKILL); starting all ranks")
    assert not any(map(_lives, pids))
    assert [word for word, _ in stage.lines("gateway")] == ["started", "stopped"]


async def test_a_replica_that_keeps_crashing_ends_nothing_while_another_serves(
    tmp_path: Path,
) -> None:
    """It is tried far more often than the limit; READY came with the one that serves."""
    stage = Stage(tmp_path, SERVES, (CRASHES,), (SERVES,))
    async with stage.running():
        await stage.becomes_ready()
        assert stage.texts == {"gateway": "gateway", "replica-1": "replica-1"}
        await wait_until(lambda: sum("replica-0 died" in line for line in stage.said) > 5)
    assert [line for line in stage.said if "replica-0 died" not in line] == ["replica-1 serves"]


async def test_a_replica_that_comes_later_is_said_and_serving_is_announced_once(
    tmp_path: Path,
) -> None:
    """The second one crashes at first; the announcement does not wait for it."""
    stage = Stage(tmp_path, SERVES, (SERVES,), (CRASHES_ONCE,))
    async with stage.running():
        await wait_until(lambda: "replica-1 serves" in stage.said)
        await stage.becomes_ready()
    assert stage.num_announced == 1


async def test_replicas_that_all_keep_crashing_end_the_server(tmp_path: Path) -> None:
    """Nobody is left: exit 1, with the last lines of the one that crashed last."""
    stage = Stage(tmp_path, SERVES, (CRASHES,), (CRASHES,))
    assert await finish(asyncio.create_task(stage.supervisor.run())) == 1
    assert "giving up" in stage.said[-1]
    assert "out of luck" in stage.said[-1]


async def test_replicas_elsewhere_keep_the_server_up(tmp_path: Path) -> None:
    """With addresses of others the gateway goes on, whatever its own replicas do."""
    policy = replace(POLICY, has_others_elsewhere=True)
    stage = Stage(tmp_path, SERVES, (CRASHES,), policy=policy)
    async with stage.running():
        await wait_until(lambda: len(stage.said) > 2 * POLICY.max_quick_crashes)
    assert [word for word, _ in stage.lines("gateway")] == ["started", "stopped"]


async def test_a_gateway_may_stand_alone(tmp_path: Path) -> None:
    """Without replicas of its own, serving begins with its READY."""
    stage = Stage(tmp_path, SERVES)
    async with stage.running():
        await stage.becomes_ready()
    assert stage.texts == {"gateway": "gateway"}


async def test_a_frozen_replica_is_started_again_and_said(tmp_path: Path) -> None:
    """The watchdog's exit code has words of its own."""
    freezes_once = CRASHES_ONCE.replace("exit(7)", f"exit({EXIT_FROZEN})")
    stage = Stage(tmp_path, SERVES, (freezes_once,))
    async with stage.running():
        await stage.becomes_ready()
    assert "made no progress, and its watchdog ended it" in stage.said[0]


async def test_many_replicas_stop_side_by_side(tmp_path: Path) -> None:
    """Those that ignore SIGTERM are killed after one grace, each said."""
    stage = Stage(tmp_path, SERVES, (DEAF,), (DEAF,), (SERVES,))
    async with stage.running():
        await wait_until(lambda: sum("serves" in line for line in stage.said) == 3)
    assert sorted(line for line in stage.said if "did not" in line) == [
        f"replica-{index} did not stop within 0.3 s; killed" for index in (0, 1)
    ]
    log = stage.log.read_text().splitlines()
    assert log.index("gateway stopped") < log.index("replica-2 stopped")


PARENT = """
    import asyncio, sys
    from rillgate_server.replica.child import ChildSpec
    from rillgate_server.replica.group import GroupSpec
    from rillgate_server.replica.restarts import RestartPolicy
    from rillgate_server.replica.supervisor import Supervisor
    gateway, *ranks = (
        ChildSpec(path, (sys.executable, path, path.replace(".py", ".log")))
        for path in sys.argv[1:]
    )
    groups = GroupSpec("gateway", (gateway,)), [GroupSpec("replica", tuple(ranks))]
    asyncio.run(Supervisor(*groups, RestartPolicy(), print, print).run())
"""


async def test_kill_9_of_the_supervisor_leaves_no_orphan(tmp_path: Path) -> None:
    """Children that would serve for ever are gone soon after their supervisor was killed."""
    names = ("gateway", "replica-rank-0", "replica-rank-1")
    stage = Stage(tmp_path, SERVES, (SERVES, SERVES))
    parent_script = tmp_path / "parent.py"
    parent_script.write_text(textwrap.dedent(PARENT))
    parent = subprocess.Popen(  # noqa: ASYNC220 - starting it is quick, waiting is bounded
        (sys.executable, parent_script, *(tmp_path / f"{name}.py" for name in names)),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        await wait_until(lambda: all(stage.lines(name) for name in names))
        pids = [stage.lines(name)[0][1] for name in names]
        assert all(map(_lives, pids))
        parent.kill()
        parent.wait(DEADLINE_S)
        await wait_until(lambda: not any(map(_lives, pids)))
    finally:
        parent.kill()
        parent.wait(DEADLINE_S)


def _lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_the_restart_policy_doubles_and_gives_up() -> None:
    """Quick crashes wait 0.1, 0.2, 0.3 … s and end with nobody left; a long life forgets them."""
    policy = RestartPolicy(first_delay_s=0.1, longest_delay_s=0.3, quick_s=10, max_quick_crashes=4)
    assert [policy.delay_s(n) for n in (0, 1, 2, 3, 4, 5000)] == [0.1, 0.1, 0.2, 0.3, 0.3, 0.3]
    assert [policy.gives_up(n) for n in range(6)] == [False] * 4 + [True] * 2
    assert [policy.gives_up(9, (n, 4)) for n in range(6)] == [False] * 4 + [True] * 2
    assert policy.count(2, 9.9) == 3
    assert policy.count(2, 10.1) == 0


def test_the_supervisor_needs_neither_torch_nor_grpc_nor_ray() -> None:
    """What it imports, directly or through others, is free of them."""
    code = (
        "import sys, rillgate_server.replica.serve; "
        "sys.exit(len({'torch', 'transformers', 'grpc', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run((sys.executable, "-c", code), timeout=DEADLINE_S, check=False)
    assert done.returncode == 0
