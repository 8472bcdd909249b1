"""The thread that watches a lease on a machine of a Ray cluster."""

import importlib
import threading
from types import ModuleType

import pytest

from rillgate_server.core.clock import VirtualClock
from tests.support.ray_cluster import why_no_ray

DEADLINE_S = 20.0
"""For what takes half a second; the machine may be busy."""

pytestmark = pytest.mark.skipif(bool(why_no_ray()), reason=why_no_ray() or "-")


@pytest.fixture(scope="module")
def ray_host() -> ModuleType:
    """The module, which imports Ray."""
    return importlib.import_module("rillgate_server.replica.ray_host")


def test_a_lease_that_is_over_is_acted_on_by_itself(ray_host: ModuleType) -> None:
    """Nobody has to call, and the clock alone decides: it may jump while the machine sleeps."""
    clock, is_over = VirtualClock(), threading.Event()
    guard = ray_host.LeaseGuard(3600.0, clock, is_over.set)
    assert guard.renew(0.0) == 0.0
    clock.advance(3600.0)
    assert is_over.wait(DEADLINE_S)
    assert guard.renew(3600.0) is None
    guard.close()


def test_a_guard_that_is_closed_acts_no_more(ray_host: ModuleType) -> None:
    """Its thread has ended."""
    clock, is_over = VirtualClock(), threading.Event()
    guard = ray_host.LeaseGuard(5.0, clock, is_over.set)
    guard.close()
    clock.advance(5.0)
    assert not is_over.is_set()
    assert "lease" not in {it.name for it in threading.enumerate()}
