"""Random checkpoints and what transformers answers for them, made once per session and kind.

A conftest imports the fixtures by name.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from rillgate_server.worker.worker import Worker, WorkerOptions
from tests.support.checkpoints import make_checkpoint
from tests.support.equality import references
from tests.support.reference import Reference, load_reference

BLOCK_SIZE = 4
NUM_BLOCKS = 400

MakeCheckpoint = Callable[[str], Path]
MakeReference = Callable[[str], tuple[PreTrainedModel, list[Reference]]]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Use one thread: the tests' models are far too small for more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Return a function that gives the checkpoint of a kind."""
    root = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda kind: make_checkpoint(root / kind, kind))


@pytest.fixture(scope="session")
def reference(checkpoint: MakeCheckpoint) -> MakeReference:
    """Return a function that gives a kind's (transformers model, answers to the mixed batch)."""

    def make(kind: str) -> tuple[PreTrainedModel, list[Reference]]:
        model = load_reference(checkpoint(kind))
        return model, references(model)

    return cache(make)


def load_worker(
    path: Path,
    dtype: str = "float32",
    block_size: int = BLOCK_SIZE,
    num_blocks: int = NUM_BLOCKS,
    kv_dtype: str = "auto",
) -> Worker:
    """Load a checkpoint and give it a cache."""
    options = WorkerOptions(dtype=dtype, block_size_tokens=block_size, kv_dtype=kv_dtype)
    worker = Worker.load(path, options)
    worker.allocate_cache(num_blocks)
    return worker
