"""The distribution as a user gets it: a wheel, installed bare into a fresh environment."""

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What the extras bring; none of it may come with, or be needed by, the bare install.
SERVER_ONLY = ("torch", "transformers", "tokenizers", "numpy", "pydantic", "jinja2", "psutil")

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the build back end that is already here."""
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bare_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel without extras into a fresh environment; return its Python."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    _run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    _run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    return python


def test_bare_install_imports_the_client_without_torch(bare_python: Path) -> None:
    """`import rillgate` works with grpcio and protobuf alone; nothing of the server is there."""
    _run_code(
        bare_python,
        "import importlib.util, rillgate",
        f"present = [name for name in {SERVER_ONLY!r} if importlib.util.find_spec(name)]",
        "assert not present, present",
    )


def test_bare_install_imports_every_module_of_the_client(bare_python: Path) -> None:
    """No module of the client needs more than the base dependencies just to be imported."""
    _run_code(
        bare_python,
        "import importlib, pkgutil, rillgate",
        "modules = [m.name for m in pkgutil.walk_packages(rillgate.__path__, 'rillgate.')]",
        "assert modules",
        "[importlib.import_module(name) for name in modules if not name.endswith('__main__')]",
    )


def test_bare_install_holds_grpcio_and_protobuf_alone(bare_python: Path) -> None:
    """The bare install brings its two dependencies and what those need, no more."""
    listing = _run(bare_python, "-m", "pip", "list", "--format=freeze")
    names = {line.split("==")[0] for line in listing.splitlines()}
    assert names - {"pip", "setuptools"} == {"rillgate", "grpcio", "protobuf", "typing_extensions"}


def test_bare_install_imports_all_generated_code(bare_python: Path) -> None:
    """Every generated module runs on the oldest generator's stamps that the wheel declares."""
    generated = sorted((ROOT / "protos").rglob("*_pb2*.py"))
    modules = [
        ".".join(path.relative_to(ROOT / "protos").with_suffix("").parts) for path in generated
    ]
    assert any(name.endswith("_pb2_grpc") for name in modules)
    _run_code(bare_python, "import importlib", f"[importlib.import_module(m) for m in {modules!r}]")


def test_bare_install_owns_the_command(bare_python: Path) -> None:
    """`rillgate --help` runs in the bare install and lists the client's commands."""
    text = _run(bare_python.with_name("rillgate"), "--help")
    for command in ("generate", "chat", "status", "bench"):
        assert command in text


def test_bare_install_says_what_the_server_needs(bare_python: Path) -> None:
    """`rillgate serve` in the bare install names the extra that it lacks, in one line."""
    outcome = subprocess.run(
        [str(bare_python.with_name("rillgate")), "serve"],
        cwd="/",
        env=_clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 2
    assert "rillgate[server]" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_wheel_carries_the_three_packages_and_their_type_markers(wheel: Path) -> None:
    """The wheel holds our three import packages with their markers and protos, and nothing else."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    packages = {top for top in tops if not top.endswith(".dist-info")}
    assert packages == {"rillgate", "rillgate_proto", "rillgate_server"}
    assert {f"{package}/py.typed" for package in packages} <= set(names)
    assert "rillgate_proto/v1/inference.proto" in names


def test_wheel_requires_grpcio_and_protobuf_alone(wheel: Path) -> None:
    """Whatever carries no extra in the metadata is what everybody installs."""
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    requirements = Parser().parsestr(archive.read(path).decode()).get_all("Requires-Dist", [])
    base = [requirement for requirement in requirements if "extra ==" not in requirement]
    assert sorted(base) == ["grpcio>=1.66.2", "protobuf<8,>=5.27.2"]


def _run(*command: str | Path) -> str:
    """Run a command away from the repository, so that nothing is imported from it by accident."""
    outcome = subprocess.run(
        [str(part) for part in command],
        cwd="/",
        env=_clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


def _run_code(python: Path, *lines: str) -> None:
    _run(python, "-c", "\n".join(lines))


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
