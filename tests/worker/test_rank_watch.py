"""The watch over other ranks: deaths at once, silence after some beats, and nothing else."""

import socket
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from rillgate_server.errors import RankLost
from rillgate_server.worker import rank_watch
from rillgate_server.worker.rank_watch import RankWatch
from tests.support.ranks import WAIT_S

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two ends of a connection."""
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let hearts beat faster: a silence of ten beats is what counts, however long they are."""
    monkeypatch.setattr(rank_watch, "HEARTBEAT_S", 0.01)


def test_one_that_beats_is_not_lost_and_one_that_leaves_says_so_first(pair: Pair) -> None:
    """Beats come for longer than a silence would be borne, and are answered."""
    ours, theirs = pair
    lost: list[RankLost] = []
    watch = RankWatch({3: ours}, lost.append)
    watch.start()
    for _ in range(3 * rank_watch.MAX_SILENT_BEATS):
        assert theirs.recv(1) == b"."
        theirs.send(b".")
    watch.stop()
    theirs.close()
    watch.close()
    assert lost == []


def test_the_end_of_a_connection_is_a_death(pair: Pair) -> None:
    """Told once, to whom asks last; who asks after it is told at once."""
    ours, theirs = pair
    first: Future[RankLost] = Future()
    watch = RankWatch({3: ours}, first.set_result)
    watch.start()
    theirs.close()
    assert "rank 3 is gone" in str(first.result(WAIT_S))
    late: list[RankLost] = []
    watch.call_on_loss(late.append)
    assert late == [first.result()]
    watch.stop()
    watch.close()


def test_silence_is_a_hang(pair: Pair) -> None:
    """The connection is there and nothing comes."""
    lost: Future[RankLost] = Future()
    watch = RankWatch({3: pair[0]}, lost.set_result)
    watch.start()
    assert "rank 3 hangs: it has been silent" in str(lost.result(WAIT_S))
    watch.stop()
    watch.close()
