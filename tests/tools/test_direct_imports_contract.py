"""The floors are checked for real: a planted import turns `lint-imports` red."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# (module that gets the import, the import, the contract that must break)
PLANTED = [
    ("server/rillgate_server/core/clock.py", "import numpy", "pure half of the server"),
    ("server/rillgate_server/kvcache/__init__.py", "import grpc", "pure half of the server"),
    ("server/rillgate_server/gateway/__init__.py", "import torch", "torch and transformers"),
    ("server/rillgate_server/core/clock.py", "import rillgate_server.worker", "A floor imports"),
    (
        "server/rillgate_server/scheduler/__init__.py",
        "import rillgate_server.worker",
        "A floor imports",
    ),
    (
        "server/rillgate_server/gateway/__init__.py",
        "import rillgate_server.kvcache",
        "The gateway's house",
    ),
    (
        "server/rillgate_server/worker/__init__.py",
        "import rillgate_server.kvcache",
        "The worker sees block numbers",
    ),
    (
        "server/rillgate_server/worker/__init__.py",
        "import rillgate_proto.v1.engine_pb2",
        "Protobuf types stop",
    ),
    ("client/rillgate/__init__.py", "import pydantic", "The client needs grpcio"),
    ("client/rillgate/__init__.py", "import rillgate_server", "The client needs grpcio"),
]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Copy what the floors are checked over, so that a test may break it."""
    for folder in ("client", "protos", "server", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def _lint_imports(checkout: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(checkout / folder) for folder in ("client", "protos", "server", "")]
    return subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"],
        cwd=checkout,
        env={"PYTHONPATH": ":".join(paths), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_floors_hold_as_committed(checkout: Path) -> None:
    """Without a planted import every contract is kept."""
    outcome = _lint_imports(checkout)
    assert outcome.returncode == 0, outcome.stdout


@pytest.mark.parametrize(("module", "statement", "contract"), PLANTED)
def test_planted_import_breaks_its_contract(
    checkout: Path, module: str, statement: str, contract: str
) -> None:
    """Each rule of the design's section 3 turns red when a module breaks it."""
    path = checkout / module
    path.write_text(path.read_text(encoding="utf-8") + f"\n{statement}\n", encoding="utf-8")
    outcome = _lint_imports(checkout)
    broken = [line for line in outcome.stdout.splitlines() if " BROKEN" in line]
    assert outcome.returncode == 1
    assert any(contract in line for line in broken), outcome.stdout + outcome.stderr
