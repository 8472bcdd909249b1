"""Which rank a process is: by its settings, or by torchrun's environment where they say nothing."""

import pytest

from rillgate_server.config.groups import ReplicaConfig
from rillgate_server.errors import ConfigError
from rillgate_server.replica.rank_place import Place, find_place

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.5",
    "MASTER_PORT": "29500",
}


def test_without_a_word_a_process_is_a_whole_model() -> None:
    """Also where torchrun started one worker alone."""
    assert find_place(ReplicaConfig(), {}) == Place(0, 1)
    assert find_place(ReplicaConfig(), TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}) == Place(0, 1)


@pytest.mark.parametrize(
    ("rendezvous", "host"),
    [("127.0.0.1:29500", "127.0.0.1"), ("host:29500", "host"), ("[fd00::1]:29500", "fd00::1")],
)
def test_settings_say_rank_and_rendezvous(rendezvous: str, host: str) -> None:
    """An environment of torchrun does not change what they say."""
    config = ReplicaConfig(rank=2, tensor_parallel_size=4, rendezvous=rendezvous)
    assert find_place(config, TORCHRUN) == Place(2, 4, host, 29500)


def test_torchrun_says_it_where_the_settings_do_not() -> None:
    """Rank 0 hosts the store, unless torchrun's agent does; then the attempt matters."""
    assert find_place(ReplicaConfig(), TORCHRUN) == Place(1, 4, "10.0.0.5", 29500, 1)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3"}
    place = find_place(ReplicaConfig(), TORCHRUN | agent)
    assert place == Place(1, 4, "10.0.0.5", 29500, 1, "3")
    assert not place.is_door


@pytest.mark.parametrize(
    ("config", "environment", "message"),
    [
        (
            ReplicaConfig(tensor_parallel_size=2),
            {},
            "replica.rendezvous is empty, replica.tensor_parallel_size 2; allowed: HOST:PORT",
        ),
        (
            ReplicaConfig(),
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a"},
            "WORLD_SIZE is 2 in the environment, but MASTER_PORT is not set",
        ),
        (ReplicaConfig(), TORCHRUN | {"RANK": "4"}, "RANK is '4'; allowed: 0 to 3"),
        (ReplicaConfig(), TORCHRUN | {"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x'; allowed: 1 to 1024"),
        (ReplicaConfig(), TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK is '4'; allowed: 0 to 3"),
        (ReplicaConfig(), TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT is '0'; allowed: 1 to"),
    ],
)
def test_what_makes_no_sense_is_refused(
    config: ReplicaConfig, environment: dict[str, str], message: str
) -> None:
    """By name, value and what is allowed."""
    with pytest.raises(ConfigError, match=f"^{message}"):
        find_place(config, environment)
