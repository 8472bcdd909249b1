"""The worker's fixtures."""

from tests.support.worker_fixtures import checkpoint, one_thread, reference

__all__ = ["checkpoint", "one_thread", "reference"]
