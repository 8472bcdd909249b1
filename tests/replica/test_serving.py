"""A replica's process, with a fake executor in place of a model: socket, signals, exit codes."""

import asyncio
import contextlib
import os
import signal
import stat
import sys
import textwrap
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from rillgate_server.core.load import FROZEN_AFTER_S
from rillgate_server.core.request import FinishReason, RejectReason
from rillgate_server.core.step import ChoiceFinished, RequestFailed
from rillgate_server.errors import NoReplica
from rillgate_server.gateway.replica_link import ReplicaLink
from rillgate_server.gateway.replica_stream import ReplicaStream, RequestRefused
from rillgate_server.replica.child import EXIT_FROZEN
from tests.replica.engine_server import make_submission, next_events, read_all, socket_directory

DEADLINE_S = 30.0
"""For a process that starts in one second; the machine may be busy."""

SCRIPT = """
    import sys, time
    from rillgate_server.config.settings import load_settings
    from rillgate_server.core.model_spec import CacheSizes
    from rillgate_server.engine.testing import FakeExecutor, FakeModel
    from rillgate_server.errors import RillgateError
    from rillgate_server.replica.serving import serve_engine
    from tests.replica.engine_server import SPEC

    socket, fault = sys.argv[1:]
    def before_step(plan):
        time.sleep(0.005)  # a model's share of a step
        if fault == "broken":
            raise RuntimeError("the device is gone")
        if fault == "frozen" and executor.num_steps == 60:
            a_kernel_that_never_returns()
    def a_kernel_that_never_returns():
        time.sleep(1000)
    executor = FakeExecutor(64, 16, FakeModel(SPEC.vocab_size), before_step=before_step)
    sizes = CacheSizes(64, 1024, "float32")
    grace = "0" if fault == "impatient" else "20"
    settings = load_settings(None, {"replica": {"socket": socket, "drain_grace_s": grace}})
    try:
        sys.exit(serve_engine(settings, SPEC, sizes, executor))
    except RillgateError as error:
        sys.exit(f"refused: {error}")
"""


@pytest.fixture
def socket() -> Iterator[Path]:
    """Where the replica listens."""
    with socket_directory() as directory:
        yield directory / "engine.sock"


@contextlib.asynccontextmanager
async def replica(socket: Path, fault: str = "none") -> AsyncIterator[Process]:
    """Start a replica's process, and leave none behind."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", textwrap.dedent(SCRIPT), str(socket), fault),
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


@contextlib.asynccontextmanager
async def linked(socket: Path) -> AsyncIterator[ReplicaLink]:
    """Link to the replica."""
    link = ReplicaLink(f"unix:{socket}")
    await link.start()
    try:
        await link.wait_ready(DEADLINE_S)
        yield link
    finally:
        await link.close()


async def exit_code(process: Process) -> int:
    """Wait for the end."""
    return await asyncio.wait_for(process.wait(), DEADLINE_S)


async def test_it_says_ready_and_its_socket_is_for_this_user_alone(socket: Path) -> None:
    """One READY line that names the model; mode 0600."""
    async with replica(socket) as process:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), DEADLINE_S)
        assert line.decode().split()[:2] == ["READY", "fake"]
        assert _mode(socket) == 0o600


async def test_sigterm_lets_streams_finish_and_refuses_new_ones(socket: Path) -> None:
    """A running stream gets all of its tokens, a new one DRAINING; exit 0, the socket is gone."""
    async with replica(socket) as process, linked(socket) as link:
        stream = link.submit(make_submission(max_tokens=200, ignore_eos=True))
        await next_events(stream)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(RequestRefused) as caught:
            await submit_until_refused(link)
        assert caught.value.rejection.reason is RejectReason.DRAINING
        end = (await read_all(stream))[-1]
        assert end == ChoiceFinished(stream.request_key, 0, FinishReason.LENGTH, 200)
        assert await exit_code(process) == 0
        assert _mode(socket) is None


async def submit_until_refused(link: ReplicaLink) -> None:
    """Submit again and again, until a signal has arrived."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            await read_all(link.submit(make_submission(max_tokens=1)))


async def test_past_the_grace_what_runs_is_cut_off(socket: Path) -> None:
    """Without any grace a stream ends in NoReplica, and the process with 0."""
    async with replica(socket, "impatient") as process, linked(socket) as link:
        stream = link.submit(make_submission(max_tokens=900, ignore_eos=True))
        await next_events(stream)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(NoReplica):
            await read_all(stream)
        assert await exit_code(process) == 0


async def test_kill_9_ends_streams_within_a_second(socket: Path) -> None:
    """Every open stream raises NoReplica; each had what had arrived."""
    async with replica(socket) as process, linked(socket) as link:
        streams = [link.submit(make_submission(max_tokens=900, ignore_eos=True)) for _ in range(8)]
        for stream in streams:
            await next_events(stream)
        process.kill()
        await process.wait()
        async with asyncio.timeout(1.0):
            for stream in streams:
                with pytest.raises(NoReplica):
                    await read_all(stream)


async def test_an_engine_that_keeps_failing_ends_the_process(socket: Path) -> None:
    """The requests fail one by one; with the third failed step in a row the exit code is 1."""
    async with replica(socket, "broken") as process, linked(socket) as link:
        with contextlib.suppress(NoReplica):
            for _ in range(3):
                events = await read_all(link.submit(make_submission()))
                assert isinstance(events[-1], RequestFailed)
        assert await exit_code(process) == 1


async def test_an_engine_that_stands_still_ends_the_process_with_every_stack(socket: Path) -> None:
    """Steps of milliseconds, then one that never ends: exit code 3, and where it hung is said."""
    async with replica(socket, "frozen") as process, linked(socket) as link:
        for num_tokens in range(1, 7):  # the costs of prefill and decode become known
            await read_all(link.submit(make_submission(*range(9 * num_tokens), max_tokens=3)))
        stream = link.submit(make_submission(max_tokens=900, ignore_eos=True))
        with pytest.raises(NoReplica):
            await asyncio.wait_for(_read_to_the_end(stream), DEADLINE_S)
        _, stderr = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert process.returncode == EXIT_FROZEN
    assert b"the engine has made no step for" in stderr
    assert b"in a_kernel_that_never_returns" in stderr


async def test_a_process_that_was_stopped_for_long_is_not_frozen(socket: Path) -> None:
    """After SIGCONT the step under way is old by the clock, and the process goes on."""
    async with replica(socket) as process, linked(socket) as link:
        stream = link.submit(make_submission(max_tokens=900, ignore_eos=True))
        await next_events(stream)
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(FROZEN_AFTER_S + 1.0)
        process.send_signal(signal.SIGCONT)
        await link.wait_ready(DEADLINE_S)
        assert await read_all(link.submit(make_submission(max_tokens=400, ignore_eos=True)))
        assert process.returncode is None


async def _read_to_the_end(stream: ReplicaStream) -> None:
    while await stream.next_events():
        pass


async def test_a_socket_that_is_in_use_is_refused(socket: Path) -> None:
    """A second replica says who is in the way; the first one goes on."""
    async with replica(socket), linked(socket) as link:
        async with replica(socket) as second:
            _, stderr = await asyncio.wait_for(second.communicate(), DEADLINE_S)
            assert b"another process listens" in stderr
            assert second.returncode == 1
        await read_all(link.submit(make_submission()))


async def test_a_file_in_the_socket_s_place_is_refused_and_kept(socket: Path) -> None:
    """A mistyped path costs nobody a file."""
    _put(socket, "precious")
    async with replica(socket) as process:
        _, stderr = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert b"refused: replica.socket is" in stderr
    assert b"no socket" in stderr
    assert _text(socket) == "precious"


async def test_a_successor_s_socket_is_kept(socket: Path) -> None:
    """Only what this process bound is removed at its end."""
    async with replica(socket) as process, linked(socket):
        _put(socket, "a successor's")
        process.send_signal(signal.SIGTERM)
        assert await exit_code(process) == 0
    assert _text(socket) == "a successor's"


def _put(path: Path, text: str) -> None:
    """Put a file in the place of whatever is there."""
    path.unlink(missing_ok=True)
    path.write_text(text)


def _text(path: Path) -> str:
    return path.read_text()


def _mode(path: Path) -> int | None:
    """Return the permissions of a file, or None if it is not there."""
    return stat.S_IMODE(path.stat().st_mode) if path.exists() else None
