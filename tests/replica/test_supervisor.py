"""The supervisor over small real processes."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rillgate_server.replica.child import ChildSpec
from rillgate_server.replica.restarts import RestartPolicy
from rillgate_server.replica.supervisor import EXIT_KILLED, EXIT_OPERATOR, Supervisor

DEADLINE_S = 20.0
"""For what takes tens of milliseconds; the machine may be busy."""

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
    sys.exit(3)
"""
REFUSES = """
    import sys
    print("rillgate: no such checkpoint", file=sys.stderr)
    sys.exit(2)
"""


class Stage:
    """A supervisor under test, its children's log, and what it said."""

    def __init__(self, directory: Path, **scripts: str) -> None:
        """Make one child per script, in the given order."""
        self.log = directory / "log.txt"
        self.log.touch()
        self.said: list[str] = []
        self.progress: list[tuple[int, int]] = []
        self.texts: dict[str, str] = {}
        self.ready = asyncio.Event()
        specs = []
        for name, script in scripts.items():
            path = directory / f"{name}.py"
            path.write_text(textwrap.dedent(script))
            log = directory / f"{name}.log"
            log.touch()
            specs.append(ChildSpec(name, (sys.executable, str(path), str(log)), stop_grace_s=0.3))
        self.directory = directory
        self.supervisor = Supervisor(
            specs,
            RestartPolicy(first_delay_s=0.01, longest_delay_s=0.02, max_quick_crashes=3),
            self._note_ready,
            self.said.append,
            lambda done, total: self.progress.append((done, total)),
        )

    def _note_ready(self, texts: dict[str, str]) -> None:
        self.texts = texts
        self.ready.set()

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
    """Ready comes when both are; a stop ends the last one first, and all exit clean."""
    stage = Stage(tmp_path, replica=SERVES, gateway=SERVES)
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
    assert stage.progress == [(1, 2), (1, 2)]


async def test_a_killed_child_is_started_again_and_the_other_goes_on(tmp_path: Path) -> None:
    """kill -9 of the replica gives a new replica; the gateway keeps its process."""
    stage = Stage(tmp_path, replica=SERVES, gateway=SERVES)
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
    stage = Stage(tmp_path, replica=CRASHES, gateway=SERVES)
    assert await finish(asyncio.create_task(stage.supervisor.run())) == 1
    assert len([line for line in stage.said if "starting it again" in line]) == 2
    assert "died 3 times" in stage.said[-1]
    assert "exit code 3" in stage.said[-1]
    assert "out of luck" in stage.said[-1]
    assert [pid for _, pid in stage.lines("gateway") if psutil.pid_exists(pid)] == []


async def test_an_operator_s_mistake_is_not_tried_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 ends the supervisor with 2; the child's line stands alone."""
    stage = Stage(tmp_path, replica=REFUSES)
    assert await finish(asyncio.create_task(stage.supervisor.run())) == EXIT_OPERATOR
    assert stage.said == []
    assert capfd.readouterr().err == "rillgate: no such checkpoint\n"


async def test_a_child_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    """Stopping takes the grace, not for ever, and says so."""
    stage = Stage(tmp_path, replica=DEAF)
    running = asyncio.create_task(stage.supervisor.run())
    await asyncio.wait_for(stage.ready.wait(), DEADLINE_S)
    stage.supervisor.request_stop()
    assert await finish(running) == 0
    assert "did not stop within" in stage.said[-1]


async def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    """Asked twice, the supervisor waits for no grace."""
    stage = Stage(tmp_path, replica=DEAF)
    running = asyncio.create_task(stage.supervisor.run())
    await asyncio.wait_for(stage.ready.wait(), DEADLINE_S)
    stage.supervisor.request_stop()
    stage.supervisor.request_stop()
    assert await finish(running) == EXIT_KILLED


PARENT = """
    import asyncio, sys
    from rillgate_server.replica.child import ChildSpec
    from rillgate_server.replica.restarts import RestartPolicy
    from rillgate_server.replica.supervisor import Supervisor
    specs = [ChildSpec("replica", (sys.executable, sys.argv[1], sys.argv[2]))]
    ready = lambda texts: print("up", flush=True)
    asyncio.run(Supervisor(specs, RestartPolicy(), ready, print).run())
"""


async def test_kill_9_of_the_supervisor_leaves_no_orphan(tmp_path: Path) -> None:
    """A child that would serve for ever is gone soon after its supervisor was killed."""
    stage = Stage(tmp_path, replica=SERVES)
    parent_script = tmp_path / "parent.py"
    parent_script.write_text(textwrap.dedent(PARENT))
    parent = subprocess.Popen(  # noqa: ASYNC220 - starting it is quick, waiting is bounded
        (
            *(sys.executable, parent_script),
            *(tmp_path / "replica.py", tmp_path / "replica.log"),
        ),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        await wait_until(lambda: bool(stage.lines("replica")))
        pid = stage.lines("replica")[0][1]
        assert psutil.pid_exists(pid)
        parent.kill()
        parent.wait(DEADLINE_S)
        await wait_until(lambda: not _lives(pid))
    finally:
        parent.kill()
        parent.wait(DEADLINE_S)


def _lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_the_restart_policy_doubles_and_gives_up() -> None:
    """Quick crashes wait 0.1, 0.2, 0.4 … s and end; a long life starts the count anew."""
    policy = RestartPolicy(first_delay_s=0.1, longest_delay_s=0.3, quick_s=10, max_quick_crashes=4)
    assert [policy.delay_s(n) for n in range(5)] == [0.1, 0.1, 0.2, 0.3, None]
    assert policy.count(2, 9.9) == 3
    assert policy.count(2, 10.1) == 0


def test_the_supervisor_needs_neither_torch_nor_grpc() -> None:
    """What it imports, directly or through others, is free of both."""
    code = (
        "import sys, rillgate_server.replica.supervisor; "
        "sys.exit(len({'torch', 'transformers', 'grpc'} & set(sys.modules)))"
    )
    done = subprocess.run((sys.executable, "-c", code), timeout=DEADLINE_S, check=False)
    assert done.returncode == 0
