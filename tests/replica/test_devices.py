"""Who computes where, and with which share of the machine."""

from pathlib import Path

import pytest

from rillgate_server.config.settings import Settings, load_settings
from rillgate_server.errors import ConfigError
from rillgate_server.replica.devices import Machine, assign_devices, find_cuda_devices

GPUS = Machine(cuda_devices=("0", "1", "2", "3"), num_cores=16, memory_bytes=1600)
NO_GPU = Machine(cuda_devices=(), num_cores=16, memory_bytes=1600)


def settings(
    num_replicas: int, num_ranks: int, devices: str = "auto", num_threads: int = 0
) -> Settings:
    """Build what a user would write."""
    return load_settings(
        overrides={
            "serve": {"num_replicas": str(num_replicas), "devices": devices},
            "replica": {
                "tensor_parallel_size": str(num_ranks),
                "num_threads": str(num_threads),
            },
        }
    )


@pytest.mark.parametrize(
    ("num_replicas", "num_ranks", "devices", "expected"),
    [
        (1, 1, "auto", ["cuda:0"]),
        (2, 1, "auto", ["cuda:0", "cuda:1"]),
        (1, 4, "auto", ["cuda:0 cuda:1 cuda:2 cuda:3"]),
        (2, 2, "auto", ["cuda:0 cuda:1", "cuda:2 cuda:3"]),
        (1, 2, "cuda:3, cuda:1", ["cuda:3 cuda:1"]),
        (3, 2, "cpu", ["cpu cpu"] * 3),
        (0, 1, "auto", []),
    ],
)
def test_each_rank_gets_a_device_of_its_own_in_order(
    num_replicas: int, num_ranks: int, devices: str, expected: list[str]
) -> None:
    """Replica by replica; CPUs are shared by any number."""
    placed = assign_devices(settings(num_replicas, num_ranks, devices), GPUS)
    assert [" ".join(place.device for place in ranks) for ranks in placed] == expected


def test_a_rank_sees_its_own_device_alone_by_the_machine_s_name_for_it() -> None:
    """CUDA_VISIBLE_DEVICES of the supervisor may name and order devices; none is seen on CPUs."""
    machine = Machine(("7", "GPU-5ebe9f43"), num_cores=4, memory_bytes=100)
    placed = assign_devices(settings(2, 1), machine)
    assert [ranks[0].visible_devices for ranks in placed] == ["7", "GPU-5ebe9f43"]
    ((alone,),) = assign_devices(settings(1, 1, "cpu"), machine)
    assert alone.visible_devices == ""


@pytest.mark.parametrize(
    ("num_replicas", "num_ranks", "num_threads", "expected"),
    [
        (1, 1, 0, 16),
        (2, 1, 0, 8),
        (3, 1, 0, 5),
        (2, 2, 0, 4),
        (20, 1, 0, 1),
        (2, 2, 7, 7),
    ],
)
def test_threads_are_a_share_of_the_cores_unless_configured(
    num_replicas: int, num_ranks: int, num_threads: int, expected: int
) -> None:
    """At least one each."""
    placed = assign_devices(settings(num_replicas, num_ranks, "auto", num_threads), NO_GPU)
    assert {place.num_threads for ranks in placed for place in ranks} == {expected}


def test_memory_is_shared_by_those_that_start_at_once() -> None:
    """Equal parts of what is free before; one process alone may take what it finds."""
    shares = {
        place.max_memory_bytes
        for ranks in assign_devices(settings(2, 2), NO_GPU)
        for place in ranks
    }
    assert shares == {400}
    ((alone,),) = assign_devices(settings(1, 1), NO_GPU)
    assert alone.max_memory_bytes == 0


def test_a_configured_limit_of_memory_is_kept() -> None:
    """It is each process's."""
    given = load_settings(
        overrides={"serve": {"num_replicas": "2"}, "replica": {"max_memory_bytes": "50"}}
    )
    assert [ranks[0].max_memory_bytes for ranks in assign_devices(given, NO_GPU)] == [50, 50]


@pytest.mark.parametrize(("num_replicas", "num_ranks"), [(5, 1), (1, 5), (3, 2)])
def test_more_processes_than_devices_are_refused_with_the_numbers(
    num_replicas: int, num_ranks: int
) -> None:
    """Asked, what makes it, and the ways out."""
    with pytest.raises(ConfigError) as caught:
        assign_devices(settings(num_replicas, num_ranks), GPUS)
    assert str(caught.value) == (
        f"serve.num_replicas is {num_replicas} and replica.tensor_parallel_size is {num_ranks}, "
        f"which makes {num_replicas * num_ranks} processes; allowed: 4, one per device (cuda:0, "
        f"cuda:1, cuda:2, cuda:3), or serve.devices = cpu"
    )


@pytest.mark.parametrize("devices", ["cuda:4", "cuda:0,cuda:0", "cpu,cuda:0", "gpu", "", "cuda"])
def test_devices_that_are_not_there_are_refused_with_those_that_are(devices: str) -> None:
    """The value, and every name that could stand there."""
    with pytest.raises(
        ConfigError, match=r"serve\.devices is '.*'; allowed: auto, cpu, or .*cuda:3"
    ):
        assign_devices(settings(1, 1, devices), GPUS)
    with pytest.raises(ConfigError, match="no CUDA device is here"):
        assign_devices(settings(1, 1, devices), NO_GPU)


def test_places_are_said_as_operators_know_them() -> None:
    """The device, and on CPUs what each has of them."""
    ((gpu,),) = assign_devices(settings(1, 1), GPUS)
    (cpu,), _ = assign_devices(settings(2, 1, "cpu"), GPUS)
    (one,), *_ = assign_devices(settings(16, 1, "cpu"), GPUS)
    assert [str(gpu), str(cpu), str(one)] == ["cuda:0", "cpu with 8 threads", "cpu with 1 thread"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [("2,0", ("2", "0")), ("", ()), ("-1", ()), ("1,-1,2", ("1",)), (" GPU-a , 3", ("GPU-a", "3"))],
)
def test_cuda_visible_devices_names_the_devices(
    given: str, expected: tuple[str, ...], tmp_path: Path
) -> None:
    """As CUDA reads it, whatever files there are."""
    (tmp_path / "nvidia0").touch()
    assert find_cuda_devices({"CUDA_VISIBLE_DEVICES": given}, tmp_path) == expected


def test_otherwise_each_device_file_is_one(tmp_path: Path) -> None:
    """A container may have but one of the machine's, which CUDA counts from zero."""
    for name in ("nvidia3", "nvidia5", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert find_cuda_devices({}, tmp_path) == ("0", "1")
