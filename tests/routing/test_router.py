"""The router: who may be chosen, whose hashes, what was sent."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from rillgate_server.core.block_hash import root_hash
from rillgate_server.core.request import ChoiceStart
from rillgate_server.core.sampling_params import SamplingParams
from rillgate_server.core.submission import Submission
from rillgate_server.kvcache.block_table import BlockTable
from rillgate_server.routing.router import RouteRequest, request_hashes
from tests.support.routing import IDLE, SIZE, WELCOME, Cluster, prompt

SALT = b"0123456789abcdef"


def test_nobody_takes_a_request_where_nobody_is() -> None:
    """Without a usable replica there is no placement."""
    assert Cluster("prefix", 0).choose(prompt(8)) is None
    cluster = Cluster("prefix", 2)
    cluster.router.add("new")
    assert cluster.choose(prompt(8), "a", "b") is None, "one is not connected, two are excluded"


def test_an_excluded_replica_is_not_chosen() -> None:
    """Whatever it has cached."""
    cluster = Cluster("prefix", 2)
    cluster.cache("a", prompt(40))
    assert cluster.choose(prompt(40), "a") == "b"


def test_draining_frozen_and_lost_replicas_are_left_out() -> None:
    """Each for its reason, and only as long as it holds."""
    cluster = Cluster("least-load", 4)
    cluster.load("a", replace(IDLE, is_draining=True))
    cluster.load("b", replace(IDLE, longest_step_s=0.1, step_age_s=5.1, num_running=1))
    cluster.view("c").told_to_drain()
    assert {cluster.send(prompt(8)) for _ in range(4)} == {"d"}
    cluster.now += 1.01
    assert cluster.choose(prompt(8)) is None, "no Load came for more than a second"
    cluster.load("b", replace(IDLE, num_running=1))
    assert cluster.choose(prompt(8)) == "b", "it went on"


def test_a_request_that_ended_counts_no_more() -> None:
    """Neither as a connection nor as work that no Load tells of; ending it twice is nothing."""
    cluster = Cluster("weighted-least-connections", 1)
    placement = cluster.router.choose(prompt(8), cluster.now)
    assert placement is not None
    ticket = cluster.router.sent(placement, prompt(8), cluster.now)
    view = cluster.view("a")
    assert (view.num_open, view.num_choices, view.num_tokens_to_compute) == (1, 1, 8)
    for _ in range(2):
        cluster.router.ended(ticket)
        assert (view.num_open, view.num_choices, view.num_tokens_to_compute) == (0, 0, 0)
    cluster.router.remove("a")
    cluster.router.ended(ticket)


def test_only_what_is_not_cached_is_work() -> None:
    """A cached beginning is not computed again, so the correction leaves it out."""
    cluster = Cluster("prefix", 1)
    cluster.cache("a", prompt(40))
    cluster.send(prompt(40))
    assert cluster.view("a").num_tokens_to_compute == 4, "the last block's logits are needed"


def test_equal_replicas_share_one_chain() -> None:
    """And one with another cache type has a chain of its own."""
    cluster = Cluster("prefix", 2)
    cluster.add("c", replace(WELCOME, kv_dtype="int8"))
    cluster.cache("b", prompt(40), 2)
    cluster.cache("c", prompt(40), 5)
    placement = cluster.router.choose(prompt(40), cluster.now)
    assert placement is not None
    assert (placement.key, placement.num_cached_tokens) == ("c", 20)
    assert cluster.choose(prompt(40), "c") == "b"


def test_another_salt_finds_nothing_but_the_shared_prefix() -> None:
    """A tenant's blocks are its own; what was declared shared is everybody's."""
    cluster = Cluster("prefix", 1)
    mine = replace(prompt(40), cache_salt=SALT, num_shared_prefix_tokens=10)
    cluster.cache("a", mine)

    def cached(request: RouteRequest) -> int:
        placement = cluster.router.choose(request, cluster.now)
        assert placement is not None
        return placement.num_cached_tokens

    assert cached(mine) == 36
    assert cached(replace(mine, cache_salt=b"another one's...")) == 8
    assert cached(replace(mine, num_shared_prefix_tokens=0)) == 0, "its first block is salted then"


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40),
    st.lists(st.integers(0, 2**32 - 1), max_size=20),
    st.integers(0, 50),
    st.sampled_from([bytes(16), SALT]),
    st.sampled_from([1, 3, 4, 16]),
)
def test_hashes_are_those_of_the_replica(
    prompt_ids: list[int], generated: list[int], num_shared: int, salt: bytes, size: int
) -> None:
    """For any tokens, continuation, salt and shared prefix they equal the block table's."""
    welcome = replace(WELCOME, block_size_tokens=size)
    request = RouteRequest(tuple(prompt_ids), tuple(generated), salt, num_shared)
    tokens = prompt_ids + generated
    table = BlockTable(salt, num_shared)
    root = root_hash(welcome.model_version_digest, welcome.kv_dtype, size)
    table.extend_hashes(tokens, (len(tokens) - 1) // size, size, root)
    assert list(request_hashes(request, welcome)) == table.hashes


def test_a_submission_is_read_whole() -> None:
    """Its open choices' given tokens are work too, and the first one's are hashed."""
    submission = Submission(
        "id",
        (1, 2, 3),
        SamplingParams(seed=1),
        max_tokens=9,
        choices=(ChoiceStart(1, (4, 5)), ChoiceStart(3, (6,))),
        cache_salt=SALT,
        num_shared_prefix_tokens=2,
    )
    request = RouteRequest.of(submission)
    assert request == RouteRequest((1, 2, 3), (4, 5), SALT, 2, 2, 3)
    assert request.num_tokens == 6
    assert len(list(request_hashes(request, replace(WELCOME, block_size_tokens=SIZE)))) == 1
