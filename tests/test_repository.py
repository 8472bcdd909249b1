"""The repository keeps its promises: result files, documents, make targets, light imports."""

import json
import re
import subprocess
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("models/*/*.md")])

# key -> type, the one format of every benchmark's result
RESULT_KEYS: dict[str, type] = {
    "name": str,
    "date": str,
    "git_commit": str,
    "hardware": dict,
    "versions": dict,
    "command": str,
    "other_load": dict,
    "rows": list,
    "ratios": dict,
}


def _result(path: Path) -> dict[str, Any]:  # Any: JSON
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def result_faults(stem: str, result: dict[str, Any]) -> list[str]:  # Any: JSON
    """List what a result named `stem`.json lacks of the format."""
    faults = [
        f"{key} is not a {kind.__name__}"
        for key, kind in RESULT_KEYS.items()
        if not isinstance(result.get(key), kind)
    ]
    if faults:
        return faults
    if result["name"] != stem:
        faults.append(f"name is {result['name']!r}, the file's is {stem!r}")
    if not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", result["git_commit"]):
        faults.append(f"git_commit is {result['git_commit']!r}")
    try:
        datetime.fromisoformat(result["date"])
    except ValueError:
        faults.append(f"date is {result['date']!r}")
    faults += [
        f"ratio {name} is {value!r}"
        for name, value in result["ratios"].items()
        if isinstance(value, bool) or not isinstance(value, int | float)
    ]
    if not result["rows"]:
        faults.append("no rows")
    faults += [
        f"row {index} has no raw samples"
        for index, row in enumerate(result["rows"])
        if not (isinstance(row, dict) and isinstance(row.get("samples"), list) and row["samples"])
    ]
    return faults


def test_result_files_have_the_one_format() -> None:
    """A result says what was measured, on what, by which command and commit, with raw samples."""
    faults = {path.name: result_faults(path.stem, _result(path)) for path in RESULTS}
    assert {name: found for name, found in faults.items() if found} == {}


def test_ratio_name_stands_in_one_result_file_only() -> None:
    """An aim is read from one place: no two files carry a ratio of the same name."""
    names = Counter(name for path in RESULTS for name in _result(path)["ratios"])
    assert [name for name, count in names.items() if count > 1] == []


def test_result_format_check_notices_what_is_missing() -> None:
    """Each key, a misnamed file, a row without samples and a ratio without a number are noticed."""
    good: dict[str, Any] = {  # Any: JSON
        "name": "good",
        "date": "2026-11-23T22:00:00+00:00",
        "git_commit": "0123abc",
        "hardware": {"cores": 2},
        "versions": {"torch": "2.13.0"},
        "command": "make bench",
        "other_load": {"load_average_1": 0.1},
        "rows": [{"name": "one", "samples": [1.0]}],
        "ratios": {"one_over_two": 2.0},
    }
    assert result_faults("good", good) == []
    for key in RESULT_KEYS:
        assert result_faults("good", {name: good[name] for name in good if name != key})
    assert result_faults("other", good)
    changes: list[dict[str, Any]] = [  # Any: JSON
        {"rows": []},
        {"rows": [{"name": "one"}]},
        {"ratios": {"one_over_two": "2"}},
        {"date": "yesterday"},
        {"git_commit": "unknown"},
    ]
    for change in changes:
        assert result_faults("good", good | change), change


def test_make_help_lists_every_target() -> None:
    """`make help` names each target that the Makefile declares."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (declared,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    listing = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    listed = {line.split()[0] for line in listing.stdout.splitlines()}
    assert listed == set(declared.split())


def test_make_targets_run_what_exists() -> None:
    """A target that runs a script or a module of the repository finds it there."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    modules = re.findall(r"python -m ((?:tools|benchmarks)[\w.]*)", makefile)
    scripts = re.findall(r"python (\S+\.py)", makefile)
    paths = [module.replace(".", "/") + ".py" for module in modules] + scripts
    assert [path for path in paths if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    """Every relative link of a document names a file that is there."""
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if not (document.parent / link).exists()] == []


def test_lock_file_names_no_registry() -> None:
    """Node packages come from whatever registry the machine is set up for."""
    lock = json.loads((ROOT / "package-lock.json").read_text(encoding="utf-8"))
    assert lock["packages"]
    assert [name for name, package in lock["packages"].items() if "resolved" in package] == []


@pytest.mark.parametrize(
    "package", ["rillgate", "rillgate_server.gateway", "rillgate_server.service"]
)
def test_gateway_and_client_never_load_torch(package: str) -> None:
    """Importing every module of the package loads neither torch nor transformers."""
    code = f"""
import importlib, pkgutil, sys
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
heavy = {{"torch", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    outcome = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
