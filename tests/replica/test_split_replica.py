"""`rillgate replica --rank R --ranks K` without a supervisor: the ranks watch each other."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.ranks import WAIT_S, free_port

Rank = subprocess.Popen[str]


@contextmanager
def ranks_of_two(socket_path: Path, *flags_of_rank_1: str) -> Iterator[list[Rank]]:
    """Start both ranks of the bundled model, in float32 unless rank 1's flags say otherwise."""
    port = free_port()
    command = (sys.executable, "-m", "rillgate_server.cli", "replica", "--dtype", "float32")
    common = ("--ranks", "2", "--rendezvous", f"127.0.0.1:{port}", "--socket", str(socket_path))
    ranks = [
        subprocess.Popen(
            (*command, *common, "--rank", str(rank), *(flags_of_rank_1 if rank else ())),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def wait_ready(rank: Rank) -> str:
    """Wait for READY; return what follows it."""
    assert rank.stdout is not None
    for line in rank.stdout:
        word, _, text = line.strip().partition(" ")
        if word == "READY":
            return text
    raise AssertionError(f"no READY came: {rank.communicate()[1]}")


def test_ranks_that_were_told_different_things_both_say_so(tmp_path: Path) -> None:
    """One line each, exit code 2; nothing was loaded."""
    with ranks_of_two(tmp_path / "socket", "--dtype", "bfloat16") as ranks:
        for rank in ranks:
            _, errors = rank.communicate(timeout=WAIT_S)
            assert rank.returncode == 2
            (line,) = errors.splitlines()
            assert line.startswith("rillgate: rank 1 (on ")
            assert "has model.dtype 'bfloat16', rank 0 (on " in line
            assert "has 'float32'; start all ranks with the same model and settings" in line


def test_a_rank_ends_with_rank_0_and_not_by_itself(tmp_path: Path) -> None:
    """SIGTERM to all is rank 0's to answer, which has streams to finish; its own death ends all."""
    with ranks_of_two(tmp_path / "socket") as ranks:
        assert wait_ready(ranks[0]).startswith("demo (")
        assert wait_ready(ranks[1]) == "rank 1 of 2"
        ranks[1].send_signal(signal.SIGTERM)
        ranks[0].kill()
        assert ranks[1].wait(WAIT_S) == 1
        assert ranks[1].stderr is not None
        assert "rillgate: rank 0 is gone" in ranks[1].stderr.read()
