"""The checkpoints that the text tests share, made once a run."""

from pathlib import Path

import pytest

from tests.gateway.text.checkpoints import DEMO, KINDS


@pytest.fixture(scope="session")
def checkpoint_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return {kind: folder} of the trained tokenizers and the bundled model's."""
    folders = {"demo": DEMO}
    for kind, write in KINDS.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        write(folders[kind])
    return folders
