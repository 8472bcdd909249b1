"""Generates the Python code that lies beside the .proto files, or checks that it is up to date.

Owns how protoc is called. Knows nothing of what the protocol says. The proto path is the Python
path, so the generated imports are right as they are and nothing is rewritten.

    python -m tools.generate_stubs             write into protos/
    python -m tools.generate_stubs --check     write nothing; fail and show the differences
"""

import difflib
import importlib.resources
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

PROTO_ROOT = Path("protos")
_GENERATED_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def generate(output: Path) -> None:
    """Write the code of every .proto file below `output`, laid out as the proto path."""
    protos = sorted(str(path.relative_to(PROTO_ROOT)) for path in PROTO_ROOT.rglob("*.proto"))
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc"),
        *(f"-I{PROTO_ROOT}", f"-I{well_known}"),
        *(f"--python_out={output}", f"--pyi_out={output}", f"--grpc_python_out={output}"),
        *protos,
    ]
    subprocess.run(command, check=True)


def _generated_files(root: Path) -> dict[str, str]:
    """Map each generated file's path below `root` to its text."""
    return {
        str(path.relative_to(root)): path.read_text(encoding="utf-8")
        for pattern in _GENERATED_PATTERNS
        for path in root.rglob(pattern)
    }


def differences() -> Iterator[str]:
    """Yield the lines of a diff from the committed code to what protoc makes now; none if equal."""
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        made = _generated_files(Path(directory))
    committed = _generated_files(PROTO_ROOT)
    for name in sorted(made.keys() | committed.keys()):
        yield from difflib.unified_diff(
            committed.get(name, "").splitlines(keepends=True),
            made.get(name, "").splitlines(keepends=True),
            fromfile=f"committed {name}",
            tofile=f"generated {name}",
        )


def main(arguments: Sequence[str]) -> int:
    """Generate, or with `--check` compare; return the exit status."""
    if "--check" not in arguments:
        generate(PROTO_ROOT)
        return 0
    difference = list(differences())
    sys.stdout.writelines(difference)
    if difference:
        print("The generated code is out of date: run `make proto` and commit what it writes.")
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
