"""What `rillgate serve` would start."""

import socket
from pathlib import Path

import pytest

from rillgate_server.config.settings import Settings, load_settings
from rillgate_server.errors import ConfigError
from rillgate_server.replica.child import ChildSpec
from rillgate_server.replica.children import gateway_group, replica_groups, socket_addresses
from rillgate_server.replica.devices import Machine, assign_devices
from rillgate_server.replica.group import GroupSpec

SECRET = "a secret of the cluster"
MACHINE = Machine(cuda_devices=(), num_cores=8, memory_bytes=8000)


def describe(directory: Path, **overrides: dict[str, str]) -> list[GroupSpec]:
    """Describe replicas for settings."""
    settings = load_settings(overrides=overrides)
    return replica_groups(settings, assign_devices(settings, MACHINE), directory)


def told(child: ChildSpec, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Read the settings as the child would."""
    for name, value in child.environment.items():
        monkeypatch.setenv(name, value)
    return load_settings()


def test_each_replica_has_a_name_a_socket_and_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else is as configured; the gateway's secret stays with the gateway."""
    groups = describe(
        tmp_path,
        serve={"num_replicas": "2"},
        batcher={"max_running": "5"},
        gateway={"cluster_secret": SECRET},
    )
    assert [group.name for group in groups] == ["replica-0", "replica-1"]
    for index, group in enumerate(groups):
        (child,) = group.children
        assert child.command[1:] == ("-m", "rillgate_server.cli", "replica")
        settings = told(child, monkeypatch)
        assert settings.replica.name == child.name == f"replica-{index}"
        assert settings.replica.socket == str(tmp_path / f"replica-{index}.sock")
        assert (settings.replica.num_threads, settings.replica.max_memory_bytes) == (4, 4000)
        assert settings.batcher.max_running == 5
        assert settings.gateway.cluster_secret == ""
        assert child.environment["CUDA_VISIBLE_DEVICES"] == ""
        assert group.fresh_environment() == {}
    assert socket_addresses(groups) == tuple(
        f"unix:{tmp_path.resolve()}/replica-{index}.sock" for index in (0, 1)
    )


def test_ranks_of_a_replica_differ_in_their_rank_and_meet_at_a_port_that_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One name and one socket; another port for each start."""
    (group,) = describe(
        tmp_path, replica={"tensor_parallel_size": "4", "name": "west", "num_threads": "3"}
    )
    assert [child.name for child in group.children] == [f"west-0 rank {rank}" for rank in range(4)]
    for rank, child in enumerate(group.children):
        settings = told(child, monkeypatch)
        assert (settings.replica.rank, settings.replica.tensor_parallel_size) == (rank, 4)
        assert settings.replica.name == "west-0"
        assert (settings.replica.num_threads, settings.replica.max_memory_bytes) == (3, 2000)
    meetings = set()
    for _ in range(5):
        ((name, address),) = group.fresh_environment().items()
        monkeypatch.setenv(name, address)
        host, _, port = load_settings().replica.rendezvous.partition(":")
        with socket.create_server((host, int(port))):
            meetings.add(port)
    assert len(meetings) > 1


def test_the_gateway_is_told_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its environment: a command line shows the secret to everybody."""
    settings = load_settings(
        overrides={
            "gateway": {"replica_addresses": '["unix:/a b.sock", "h:1"]', "cluster_secret": SECRET}
        }
    )
    group = gateway_group(settings)
    (child,) = group.children
    assert child.command[1:] == ("-m", "rillgate_server.cli", "gateway")
    assert told(child, monkeypatch).gateway == settings.gateway
    assert SECRET not in repr(group)


def test_one_replica_may_have_the_configured_socket(tmp_path: Path) -> None:
    """Others can find it there."""
    (group,) = describe(tmp_path, replica={"socket": "somewhere.sock"})
    assert socket_addresses([group]) == (f"unix:{Path.cwd()}/somewhere.sock",)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [("socket", "/run/r.sock", "none"), ("listen", "0.0.0.0:7001", "port 0")],
)
def test_one_door_for_many_replicas_is_refused(
    field: str, value: str, allowed: str, tmp_path: Path
) -> None:
    """Field, value, how many, and what would do."""
    with pytest.raises(
        ConfigError, match=rf"replica\.{field} is '{value}' for 2 replicas; allowed: {allowed}"
    ):
        describe(tmp_path, serve={"num_replicas": "2"}, replica={field: value})


def test_a_port_that_the_system_chooses_will_do_for_many(tmp_path: Path) -> None:
    """Each takes another."""
    groups = describe(tmp_path, serve={"num_replicas": "2"}, replica={"listen": "0.0.0.0:0"})
    assert len(groups) == 2
