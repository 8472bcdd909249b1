"""Fails on files, functions and parameter lists that grew too big (docs/style.md, rule 4).

Owns the three limits and how they are counted. Knows nothing of what the code means: a function
whose signature carries `# size: reason`, or a file whose first line does, is let through, and the
reason is for the reviewer. For a parameter list ruff's `# noqa: PLR0913 - reason` says it for both.

    python -m tools.check_size [PATH ...]      default: every tracked Python file
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 6

_EXCUSE = "# size: "
_PARAMETERS_EXCUSE = "# noqa: PLR0913"
_GENERATED_SUFFIXES = ("_pb2.py", "_pb2_grpc.py")
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is too big, and by how much."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        """Format as tools and editors expect it: path, line, message."""
        return f"{self.path}:{self.line}: {self.message}"


def check_source(path: str, source: str) -> list[Finding]:
    """List what is too big in one file's text; `path` is only named in the findings."""
    lines = source.splitlines()
    findings: list[Finding] = []
    if len(lines) > MAX_FILE_LINES and _EXCUSE not in lines[0]:
        findings.append(Finding(path, 1, f"file of {len(lines)} lines (at most {MAX_FILE_LINES})"))
    for function, is_method in _functions(ast.parse(source, filename=path)):
        signature = "\n".join(lines[function.lineno - 1 : function.body[0].lineno])
        findings += [
            Finding(path, function.lineno, f"{function.name}: {message}")
            for message in _function_faults(function, is_method, signature)
        ]
    return findings


def _functions(tree: ast.AST) -> Iterator[tuple[_Function, bool]]:
    """Yield every function with whether it stands directly in a class."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, _Function):
                yield child, isinstance(node, ast.ClassDef)


def _function_faults(function: _Function, is_method: bool, signature: str) -> Iterator[str]:
    if _EXCUSE in signature:
        return
    num_lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if num_lines > MAX_FUNCTION_LINES:
        yield f"{num_lines} lines (at most {MAX_FUNCTION_LINES})"
    num_parameters = _num_parameters(function, is_method)
    if num_parameters > MAX_PARAMETERS and _PARAMETERS_EXCUSE not in signature:
        yield f"{num_parameters} parameters (at most {MAX_PARAMETERS})"


def _num_parameters(function: _Function, is_method: bool) -> int:
    """Count what a caller can pass: not `self` or `cls`; `*args` and `**kwargs` count one each."""
    arguments = function.args
    names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    is_static = any(
        isinstance(decorator, ast.Name) and decorator.id == "staticmethod"
        for decorator in function.decorator_list
    )
    receiver = 1 if is_method and not is_static else 0
    return len(names) - receiver + (arguments.vararg is not None) + (arguments.kwarg is not None)


def tracked_files(root: Path) -> list[Path]:
    """List the repository's Python files that people write, as git knows them."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    names = [name for name in listing.stdout.splitlines() if not name.endswith(_GENERATED_SUFFIXES)]
    return [Path(name) for name in names if (root / name).is_file()]


def main(arguments: Sequence[str]) -> int:
    """Check the named files, or all; return the exit status."""
    paths = [Path(argument) for argument in arguments] or tracked_files(Path.cwd())
    findings = [
        finding
        for path in paths
        for finding in check_source(str(path), path.read_text(encoding="utf-8"))
    ]
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
