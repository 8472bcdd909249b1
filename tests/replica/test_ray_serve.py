"""What is asked of a Ray cluster, and what is refused before one is looked for."""

import importlib
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rillgate_server.config.settings import Settings
from rillgate_server.errors import ConfigError
from tests.support.ray_cluster import why_no_ray

pytestmark = pytest.mark.skipif(bool(why_no_ray()), reason=why_no_ray() or "-")


@pytest.fixture(scope="module")
def ray_serve() -> ModuleType:
    """The module, which imports Ray."""
    return importlib.import_module("rillgate_server.replica.ray_serve")


def _settings(**changes: dict[str, Any]) -> Settings:
    settings = Settings()
    return settings.model_copy(
        update={name: replace(getattr(settings, name), **it) for name, it in changes.items()}
    )


def test_a_replica_asks_for_a_core_per_thread_of_each_rank(ray_serve: ModuleType) -> None:
    """Ranks differ in nothing but their rank, and see no GPU."""
    settings = _settings(
        serve={"num_replicas": 2}, replica={"num_threads": 3, "tensor_parallel_size": 2}
    )
    plans = list(ray_serve.ray_plans(settings, has_gpus=False))
    assert [plan.name for plan in plans] == ["replica-0", "replica-1"]
    assert plans[0].bundle == {"CPU": 3.0}
    environments = [rank.environment for rank in plans[0].ranks]
    assert [it["RILLGATE_REPLICA__RANK"] for it in environments] == ["0", "1"]
    assert {it["CUDA_VISIBLE_DEVICES"] for it in environments} == {""}
    assert {it["RILLGATE_REPLICA__NAME"] for it in environments} == {"replica-0"}


def test_where_there_are_gpus_each_rank_asks_for_one_unless_told_not_to(
    ray_serve: ModuleType,
) -> None:
    """Which one is Ray's to say."""
    (plan,) = ray_serve.ray_plans(_settings(), has_gpus=True)
    assert plan.bundle == {"CPU": 1.0, "GPU": 1.0}
    assert "CUDA_VISIBLE_DEVICES" not in plan.ranks[0].environment
    (plan,) = ray_serve.ray_plans(_settings(serve={"devices": "cpu"}), has_gpus=True)
    assert plan.bundle == {"CPU": 1.0}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"serve": {"num_replicas": 0}}, "serve.num_replicas is 0"),
        ({"serve": {"devices": "cuda:0"}}, "serve.devices is 'cuda:0'"),
        ({"replica": {"listen": "0.0.0.0:1"}}, "replica.listen is '0.0.0.0:1'"),
        ({"replica": {"socket": "/run/r.sock"}}, "replica.socket is '/run/r.sock'"),
        ({"serve": {"ray_address": "ray://10.0.0.1:10001"}}, "serve.ray_address is 'ray://"),
        ({"serve": {"ray_address": "somewhere"}}, "serve.ray_address is 'somewhere'"),
    ],
)
def test_what_ray_decides_or_cannot_be_is_refused(
    ray_serve: ModuleType, changes: dict[str, dict[str, Any]], named: str
) -> None:
    """The message names field, value and what is allowed."""
    with pytest.raises(ConfigError, match="allowed: ") as raised:
        ray_serve.run_serve(_settings(**changes), Path())
    assert named in str(raised.value)


def test_a_cluster_that_is_not_there_is_said_at_once(ray_serve: ModuleType) -> None:
    """Ray would try for two minutes."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"no Ray cluster was found there .*refused"):
            ray_serve.run_serve(_settings(serve={"ray_address": address}), Path())


def test_a_machine_s_memory_goes_with_its_cores_or_gpus() -> None:
    """A rank that has half of the cores may have half of the memory."""
    memory_share = importlib.import_module("rillgate_server.replica.ray_replica").memory_share
    nodes = [{"NodeID": "a", "Resources": {"CPU": 4.0, "GPU": 1.0, "memory": 1000.0}}]
    assert memory_share(nodes, "a", {"CPU": 2.0}) == 500
    assert memory_share(nodes, "a", {"CPU": 1.0, "GPU": 1.0}) == 1000
    assert memory_share(nodes, "gone", {"CPU": 1.0}) == 0


def test_without_ray_the_command_says_what_to_install() -> None:
    """One line and exit code 2."""
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from rillgate.cli import main\n"
        "sys.exit(main(['serve', '--cluster', 'ray']))"
    )
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "rillgate: serve.cluster is ray, and the package ray is not installed; allowed: local, or "
        "`pip install 'rillgate[server,ray]'`\n"
    )
