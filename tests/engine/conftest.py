"""Fixtures of the tests that run a real model."""

from tests.support.worker_fixtures import checkpoint, one_thread, reference

__all__ = ["checkpoint", "one_thread", "reference"]
