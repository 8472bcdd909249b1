"""What `model.quantization = auto` chose is kept, and all who start agree."""

import threading
from pathlib import Path

import pytest

from rillgate_server.config.settings import bundled_model_dir
from rillgate_server.core.quantization_choice import Choice, describe_machine, recall_or_choose
from rillgate_server.errors import ConfigError

CHOICE = Choice("int8", "it takes 0.60 of the time")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def never() -> Choice:
    """Fail."""
    raise AssertionError("chosen again")


def test_it_is_chosen_once_for_machine_and_model() -> None:
    """The next one reads it; another machine chooses for itself."""
    first = recall_or_choose(bundled_model_dir(), "a", lambda: CHOICE)
    again = recall_or_choose(bundled_model_dir(), "a", never)
    assert (first[0], first[2], again[0], again[2]) == (CHOICE, True, CHOICE, False)
    assert first[1] == again[1]
    other = recall_or_choose(bundled_model_dir(), "b", lambda: Choice("none", "slower"))
    assert other[0].quantization == "none"


def test_those_who_start_together_wait_for_one() -> None:
    """One measures; all have its choice."""
    measuring, go_on = threading.Event(), threading.Event()
    found: list[Choice] = []

    def choose() -> Choice:
        measuring.set()
        assert go_on.wait(10)
        return CHOICE

    def start(choose_or_fail: object) -> threading.Thread:
        def run() -> None:
            assert callable(choose_or_fail)
            found.append(recall_or_choose(bundled_model_dir(), "a", choose_or_fail)[0])

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    threads = [start(choose)]
    assert measuring.wait(10)
    threads += [start(never) for _ in range(3)]
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert found == [CHOICE] * 4


def test_a_file_that_cannot_be_read_is_made_anew() -> None:
    """Cut off, or of another time."""
    _, path, _ = recall_or_choose(bundled_model_dir(), "a", lambda: CHOICE)
    path.write_text('{"quantization": "int8"', encoding="utf-8")
    choice, _, is_new = recall_or_choose(bundled_model_dir(), "a", lambda: CHOICE)
    assert (choice, is_new) == (CHOICE, True)


def test_a_directory_that_cannot_be_made_is_named(cache: Path) -> None:
    """With the way out."""
    cache.write_text("no directory", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cannot be kept in .*; allowed: XDG_CACHE_HOME"):
        recall_or_choose(bundled_model_dir(), "a", lambda: CHOICE)


def test_a_machine_is_its_processor_and_its_cores(tmp_path: Path) -> None:
    """As the system names it."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name : A CPU 9000\n", encoding="utf-8")
    assert describe_machine(cpuinfo, 4).startswith("4 cores of A CPU 9000")
