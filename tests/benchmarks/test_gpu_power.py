"""Joules between two moments, from a counter or from watts."""

import pytest

from benchmarks.gpu.power import EnergyLog, energy_log, open_counter, parse_watts


def test_energy_between_moments_lies_on_the_line_between_readings() -> None:
    """A counter of 100 W, then 300 W, read every second."""
    log = EnergyLog()
    for now_s, joules in ((10.0, 1000.0), (11.0, 1100.0), (12.0, 1400.0)):
        log.add(now_s, joules)
    assert log.joules(10.0, 12.0) == 400.0
    assert log.joules(10.5, 11.5) == pytest.approx(50.0 + 150.0)


def test_energy_is_not_known_where_no_readings_lie_around() -> None:
    """Before the first, behind the last, without any, and for no time at all."""
    log = EnergyLog()
    assert log.joules(0.0, 1.0) is None
    log.add(10.0, 0.0)
    log.add(11.0, 5.0)
    assert log.joules(9.9, 10.5) is None
    assert log.joules(10.5, 11.1) is None
    assert log.joules(10.5, 10.5) is None


def test_watts_add_up_to_joules() -> None:
    """Each holds since the reading before it; the first one starts the log."""
    log = EnergyLog()
    for now_s, watts in ((0.0, 999.0), (2.0, 100.0), (3.0, 50.0)):
        log.add_watts(now_s, watts)
    assert log.joules(0.0, 3.0) == 250.0


@pytest.mark.parametrize(
    ("line", "watts"),
    [
        ("512.31\n", 512.31),
        (" 75.00 W\n", 75.0),
        ("power.draw [W]\n", None),
        ("[N/A]\n", None),
        ("\n", None),
    ],
)
def test_line_of_nvidia_smi_says_watts_or_nothing(line: str, watts: float | None) -> None:
    """A heading, or a device without such a sensor, is no reading."""
    assert parse_watts(line) == watts


def test_machine_without_the_library_has_no_counter() -> None:
    """And the log stays empty rather than wrong."""
    assert open_counter("libno-such-thing.so") is None


def test_log_is_empty_where_nobody_says_the_power(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library, no nvidia-smi on the path."""
    if open_counter() is not None:
        pytest.skip("there is a counter")
    monkeypatch.setenv("PATH", "")
    with energy_log() as log:
        assert log.joules(0.0, 1.0) is None
