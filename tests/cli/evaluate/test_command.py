"""`rillgate evaluate` as people run it, and what its parts refuse before anything is loaded."""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rillgate_server.cli.evaluate.command import evaluate, read_material
from rillgate_server.cli.evaluate.exact_match import task_requests
from rillgate_server.cli.evaluate.task_file import TASK_FILE
from rillgate_server.config.settings import bundled_model_dir, load_settings
from rillgate_server.core.checkpoint import read_model_spec
from rillgate_server.errors import ConfigError

NUM_TASKS = 300
TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own."""
    command = [sys.executable, "-m", "rillgate_server.cli", "evaluate", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)


def flags(**given: object) -> argparse.Namespace:
    """Return parsed flags."""
    nothing = {"tasks": None, "num_tasks": None, "text": None, "max_tokens": 1024, "json": None}
    return argparse.Namespace(**(nothing | given))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:  # Any: JSON
    """Evaluate the bundled model in three settings; weights and cache -> row."""
    folder = tmp_path_factory.mktemp("evaluate")
    text = folder / "text.txt"
    text.write_text("What is 12 + 30?" * 12)
    done = run(
        *("--compare", "none,int8,int8-cache", "--num-tasks", str(NUM_TASKS)),
        *("--text", str(text), "--json", str(folder / "out.json")),
        *("--set", "model.max_context_tokens=512", "--set", "replica.num_threads=1"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "out.json").read_text())
    assert report["model"] == "demo"
    header, rule, *lines = done.stdout.splitlines()[:5]
    assert header.startswith("| weights | type     | cache    | exact match")
    assert set(rule) <= set("|- ")
    for line, row in zip(lines, report["rows"], strict=True):
        assert f"| {row['exact_match']['percent']:.1f} % of {NUM_TASKS} " in line
        assert f"| {row['perplexity']['perplexity']:.4f} " in line
    last = f"row 3 of 3 (none, bfloat16, int8 cache): tasks: {NUM_TASKS} of {NUM_TASKS}"
    assert last in done.stderr
    return {f"{row['quantization']} {row['kv_dtype']}": row for row in report["rows"]}


def test_int8_weights_answer_as_well(rows: dict[str, dict[str, Any]]) -> None:
    """Exact match drops by at most half a point, and the scores are high enough to show it."""
    exact, int8 = rows["none bfloat16"], rows["int8 bfloat16"]
    assert exact["exact_match"]["percent"] > 95
    assert int8["exact_match"]["percent"] >= exact["exact_match"]["percent"] - 0.5
    nll = exact["perplexity"]["mean_nll_nats"]
    assert int8["perplexity"]["mean_nll_nats"] == pytest.approx(nll, rel=0.01)
    assert int8["perplexity"]["mean_nll_nats"] != nll


def test_an_int8_cache_answers_as_well(rows: dict[str, dict[str, Any]]) -> None:
    """Exact match drops by at most one point."""
    exact, int8 = rows["none bfloat16"], rows["none int8"]
    assert int8["exact_match"]["percent"] >= exact["exact_match"]["percent"] - 1
    assert int8["layer_bytes"] == exact["layer_bytes"]


def test_each_kind_is_counted_by_itself(rows: dict[str, dict[str, Any]]) -> None:
    """The kinds add up to all."""
    for row in rows.values():
        kinds = row["exact_match_by_kind"]
        assert {it["num_tasks"] for it in kinds.values()} == {NUM_TASKS // 6}
        num_right = sum(it["num_right"] for it in kinds.values())
        assert num_right == row["exact_match"]["num_right"]


def test_int8_layers_take_half_of_their_bf16_bytes(rows: dict[str, dict[str, Any]]) -> None:
    """And a scale per channel, which is 2 % where channels are as short as this model's; embedding
    and head stay as they are."""
    exact, int8 = rows["none bfloat16"], rows["int8 bfloat16"]
    num_weights = 6 * (2 * 192 * 192 + 2 * 64 * 192 + 3 * 512 * 192)
    num_channels, num_biases = 6 * (192 + 64 + 64 + 192 + 512 + 512 + 192), 6 * (192 + 64 + 64)
    assert int8["layer_bytes"] == num_weights + 4 * num_channels + 4 * num_biases
    assert int8["layer_bytes_in_bf16"] == 2 * (num_weights + num_biases)
    assert exact["layer_bytes"] == int8["layer_bytes_in_bf16"]
    saved = exact["layer_bytes"] - int8["layer_bytes"]
    assert exact["model_bytes"] - int8["model_bytes"] == saved
    checkpoint = (bundled_model_dir() / "model.safetensors").stat().st_size
    assert exact["model_bytes"] == pytest.approx(checkpoint, rel=0.01)


def test_a_split_model_scores_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two processes; the text's likelihood moves by rounding alone."""
    # Joining a group chooses it for the process and its children, which here are later tests'.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    model_dir = bundled_model_dir()
    overrides = {"model": {"path": str(model_dir), "max_context_tokens": "512"}}
    whole = load_settings(None, overrides | {"replica": {"num_threads": "1"}})
    replica = replace(whole.replica, tensor_parallel_size=2)
    split = whole.model_copy(update={"replica": replica})
    material = replace(
        read_material(model_dir, flags(num_tasks=6)), token_ids=(256, *b"What is 12 + 30?")
    )
    one, two = evaluate([whole, split], model_dir, material)
    assert two.num_ranks == 2
    assert one.scores == two.scores
    assert one.perplexity is not None
    assert two.perplexity is not None
    assert two.perplexity.mean_nll == pytest.approx(one.perplexity.mean_nll, rel=0.01)
    assert two.weights.layers == pytest.approx(one.weights.layers / 2, rel=0.01)


def test_a_bad_task_file_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """No traceback, and nothing is loaded before."""
    path = tmp_path / "tasks.jsonl"
    path.write_text("{}\n")
    done = run("--tasks", str(path))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"rillgate: {path}, line 1 has neither of messages and prompt; allowed: one of them"
    ]
    assert done.stdout == ""


def test_without_tasks_and_text_there_is_nothing_to_evaluate(tmp_path: Path) -> None:
    """A checkpoint that brings no tasks needs a file; with a text alone nothing is asked."""
    for name in TOKENIZER_FILES:
        shutil.copy(bundled_model_dir() / name, tmp_path)
    with pytest.raises(ConfigError, match=f"there is nothing to evaluate: {tmp_path} has no"):
        read_material(tmp_path, flags())
    text = tmp_path / "text"
    text.write_text("a text")
    material = read_material(tmp_path, flags(text=text))
    assert (material.tasks, len(material.token_ids)) == ((), 7)
    with pytest.raises(ConfigError, match="--num-tasks is 3; allowed: none without tasks"):
        read_material(tmp_path, flags(text=text, num_tasks=3))
    text.write_text("")
    with pytest.raises(ConfigError, match="is empty; allowed: a text of at least two tokens"):
        read_material(tmp_path, flags(text=text))
    with pytest.raises(ConfigError, match="--max-tokens is 0; allowed: at least 1"):
        read_material(bundled_model_dir(), flags(max_tokens=0))


def test_a_prompt_that_cannot_be_asked_is_named_by_file_and_line(tmp_path: Path) -> None:
    """One that the context does not hold, and one that the chat template refuses."""
    model_dir = bundled_model_dir()
    spec = replace(read_model_spec(model_dir), max_context_tokens=20)
    path = tmp_path / TASK_FILE
    path.write_text(json.dumps({"prompt": "x" * 19, "answer": "a"}))
    material = read_material(model_dir, flags(tasks=path))
    with pytest.raises(ConfigError, match=r"line 1: the prompt has 20 tokens; allowed: at most 19"):
        task_requests(material.tasks, material.text, spec, 8)
    path.write_text('\n{"messages": [{"role": "tool", "content": "x"}], "answer": "a"}')
    material = read_material(model_dir, flags(tasks=path))
    with pytest.raises(ConfigError, match=r"line 2: chat.messages is a conversation of roles tool"):
        task_requests(material.tasks, material.text, spec, 8)
