"""How much memory is free: the machine's, or what a container's limit leaves."""

from pathlib import Path

import psutil
import pytest

from rillgate_server.worker.host_memory import available_bytes, spare_bytes


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    """No control group, or one that says `max`."""
    for text in (None, "max\n"):
        if text is not None:
            (tmp_path / "memory.max").write_text(text)
            (tmp_path / "memory.current").write_text("5\n")
        free_bytes = available_bytes(tmp_path)
        assert 0 < free_bytes <= psutil.virtual_memory().total


def test_a_containers_limit_counts_without_its_page_cache(tmp_path: Path) -> None:
    """Limit 100, used 70, of which 20 are file pages that the kernel can drop."""
    (tmp_path / "memory.max").write_text("100\n")
    (tmp_path / "memory.current").write_text("70\n")
    assert available_bytes(tmp_path) == 30
    (tmp_path / "memory.stat").write_text("anon 40\ninactive_file 15\nactive_file 5\n")
    assert available_bytes(tmp_path) == 50


def test_a_container_over_its_limit_has_nothing_free(tmp_path: Path) -> None:
    """Never negative."""
    (tmp_path / "memory.max").write_text("100\n")
    (tmp_path / "memory.current").write_text("130\n")
    assert available_bytes(tmp_path) == 0


def test_a_share_of_the_memory_counts_without_what_the_process_has_already() -> None:
    """The weights are in the share, too; no share is all that is free."""
    free_bytes = psutil.virtual_memory().total
    assert 0 < spare_bytes(0) <= free_bytes
    assert spare_bytes(free_bytes * 2) <= free_bytes
    share_bytes = psutil.Process().memory_info().rss + (256 << 20)
    before = spare_bytes(share_bytes)
    held = bytearray(b"x" * (64 << 20))
    assert before - spare_bytes(share_bytes) == pytest.approx(len(held), rel=0.25)
    assert spare_bytes(1) == 0
