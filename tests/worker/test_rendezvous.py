"""Ranks that meet: who comes, who is refused and why, who is no rank at all."""

import json
import socket
from collections.abc import Mapping
from concurrent.futures import Future
from threading import Thread

import pytest

from rillgate_server.errors import ConfigError
from rillgate_server.worker.rank_link import RankLink
from rillgate_server.worker.rendezvous import Meeting, RankPlace, _open_store, meet
from tests.support.ranks import WAIT_S, free_port

FACTS = {"model digest": "abc", "model.dtype": "float32"}


def meeting(
    port: int,
    rank: int,
    ranks: int,
    facts: Mapping[str, str] = FACTS,
    join_s: float = WAIT_S,
    device: str = "",
) -> "Future[Meeting]":
    """Let a rank come, on a thread of its own."""
    future: Future[Meeting] = Future()

    def run() -> None:
        try:
            place = RankPlace(rank, ranks, "127.0.0.1", port)
            future.set_result(meet(place, facts, device, join_s))
        except Exception as error:  # for the test to look at
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def close(*meetings: Meeting) -> None:
    """Close all connections."""
    for met in meetings:
        for link in met.links.values():
            link.close()
        for beat in met.beats.values():
            beat.close()


def test_ranks_that_agree_are_linked_with_rank_0() -> None:
    """In whatever order they come; each knows how many share its machine."""
    port = free_port()
    others = [meeting(port, rank, 3) for rank in (2, 1)]
    host = meeting(port, 0, 3).result(WAIT_S)
    met = [other.result(WAIT_S) for other in others]
    assert sorted(host.links) == sorted(host.beats) == [1, 2]
    for rank, other in zip((2, 1), met, strict=True):
        host.links[rank].send(b"to %d" % rank)
        assert other.links[0].receive(WAIT_S) == b"to %d" % rank
        assert other.num_local == 3
    assert host.num_local == 3
    close(host, *met)


def test_two_ranks_cannot_share_a_gpu() -> None:
    """CPUs they can (the other tests), and two that each have their own."""
    port = free_port()
    ranks = [meeting(port, rank, 2, device="GPU-0") for rank in (0, 1)]
    says = r"rank 1 and rank 0 \(on .*\) have the same CUDA device, GPU-0; allowed: at most one"
    for future in ranks:
        with pytest.raises(ConfigError, match=says):
            future.result(WAIT_S)
    port = free_port()
    ranks = [meeting(port, rank, 2, device=f"GPU-{rank}") for rank in (0, 1)]
    close(*(future.result(WAIT_S) for future in ranks))


@pytest.mark.parametrize("name", list(FACTS))
def test_ranks_that_disagree_are_all_refused(name: str) -> None:
    """Every one of them hears what differs, where, and what to do."""
    port = free_port()
    host = meeting(port, 0, 3)
    agreeing = meeting(port, 1, 3)
    other = meeting(port, 2, 3, FACTS | {name: "xyz"})
    for rank in (host, other):
        with pytest.raises(ConfigError, match="start all ranks with the same") as refusal:
            rank.result(WAIT_S)
        assert f"has {name} 'xyz', rank 0" in str(refusal.value)
        assert f"has {FACTS[name]!r}; start all" in str(refusal.value)
    # Whether it had come before the refusal or finds nobody, it does not wait for ever.
    assert agreeing.exception(WAIT_S) is not None


def test_a_rank_that_comes_twice_is_refused_and_the_first_one_stays() -> None:
    """Two were started with the same number."""
    port = free_port()
    host = meeting(port, 0, 3)
    twins = [meeting(port, 1, 3) for _ in range(2)]
    refusals: Future[BaseException] = Future()
    for twin in twins:
        twin.add_done_callback(
            lambda it: refusals.set_result(error) if (error := it.exception()) else None
        )
    assert "rank 1 has come to 127.0.0.1" in str(refusals.result(WAIT_S))
    last = meeting(port, 2, 3)
    host.result(WAIT_S)
    done = [twin.result(WAIT_S) for twin in twins if twin.exception(WAIT_S) is None]
    assert len(done) == 1
    close(host.result(), last.result(WAIT_S), *done)


def test_a_rank_that_does_not_come_is_named() -> None:
    """With the command that starts it."""
    port = free_port()
    with pytest.raises(ConfigError, match=r"rank 1, 2 of 3 did not come .* --ranks 3 --rendezvous"):
        meeting(port, 0, 3, join_s=0.1).result(WAIT_S)


def test_a_place_that_cannot_be_had_is_said() -> None:
    """Taken by somebody else on rank 0's machine; nobody there for another rank."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"'127.0.0.1:{port}', which cannot be bound"):
            meeting(port, 0, 2).result(WAIT_S)
    with pytest.raises(ConfigError, match="cannot be reached"):
        meeting(free_port(), 1, 2, join_s=0.1).result(WAIT_S)


def test_strangers_are_let_go_and_the_ranks_still_meet() -> None:
    """Bytes that are no hello, a wrong key, a rank that there is not: nobody waits for them."""
    port = free_port()
    host = meeting(port, 0, 2)
    control = json.loads(_open_store(RankPlace(1, 2, "127.0.0.1", port), WAIT_S).get("control"))
    hello = {"key": control["key"], "rank": 1, "channel": "plans", "facts": {}, "machine": "m"}
    for data in (
        b"GET / HTTP/1.1",
        json.dumps(hello | {"key": "guess"}).encode(),
        json.dumps(hello | {"rank": 7}).encode(),
        json.dumps([1, 2]).encode(),
    ):
        stranger = socket.create_connection((control["address"], control["port"]), WAIT_S)
        link = RankLink(stranger, "rank 0")
        link.send(data)
        assert link.wait_closed(WAIT_S)
        link.close()
    other = meeting(port, 1, 2)
    close(host.result(WAIT_S), other.result(WAIT_S))
