"""Generated code that does not fit its .proto file is noticed."""

import shutil
from pathlib import Path

import pytest

from tools import generate_stubs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def protos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the protos to a folder that a test may change, and work there."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "protos"


@pytest.mark.usefixtures("protos")
def test_committed_code_is_up_to_date() -> None:
    """What is committed is what protoc makes of the .proto files."""
    assert list(generate_stubs.differences()) == []


def test_changed_proto_is_noticed(protos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A field added to a message without `make proto` fails the check and is shown."""
    proto = protos / "rillgate_proto" / "v1" / "inference.proto"
    with proto.open("a", encoding="utf-8") as text:
        text.write("\nmessage Unheard { string of = 1; }\n")
    assert generate_stubs.main(["--check"]) == 1
    assert "Unheard" in capsys.readouterr().out
    generate_stubs.main([])
    assert generate_stubs.main(["--check"]) == 0


def test_orphaned_code_is_noticed(protos: Path) -> None:
    """Generated code whose .proto file is gone fails the check."""
    (protos / "rillgate_proto" / "v1" / "control.proto").unlink()
    assert any("control_pb2.py" in line for line in generate_stubs.differences())
