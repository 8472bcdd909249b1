"""`make gpu-check` from end to end in tiny shapes on a CPU; its table; and what it does without a
GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.check import main
from benchmarks.gpu.children import Findings
from benchmarks.gpu.correctness import count, run_checks, section
from benchmarks.gpu.plan import NAMES
from benchmarks.gpu.ratios import AIMS, ratios
from benchmarks.gpu.rows import DID_NOT_END, Row
from benchmarks.gpu.table import table
from tests.test_repository import result_faults

_WAITS = {"p50": 700.0, "p90": 800.0, "p95": 900.0, "p99": 1000.0, "max": 1100.0}
LIMITS: Row = {
    "part": "limits",
    "what": "limits",
    "device": "cuda:0 (a GPU)",
    "read_bytes_per_s": 4e12,
    "copy_bytes_per_s": 3.8e12,
    "bf16_ops_per_s": 800e12,
    "bf16_ops_per_s_median": 700e12,
    "int8_ops_per_s": 1500e12,
    "samples": [1],
}


def _decode(part: str, batch: int, step_ms: float, **more: Any) -> Row:  # Any: columns
    row = {
        "part": part,
        "what": "decode",
        "shape": "7b",
        "quantization": "int8" if part == "int8" else "none",
        "batch": batch,
        "context_tokens": 1100.0,
        "step_ms": step_ms,
        "tokens_per_s": batch / step_ms * 1e3,
        "read_bytes": 16e9,
        "operations": 4e12 if batch == 256 else 1e12,
        "device_idle_share": None,
        "joules_per_token": None,
        "samples": [step_ms],
    }
    return row | more


def _requests(part: str, what: str, count: int, rate: float) -> Row:
    return {
        "part": part,
        "what": what,
        "requests": count,
        "prompt_tokens": 512,
        "output_tokens": 256,
        "seconds": count * 256 / rate,
        "output_tokens_per_s": rate,
        "attention": "its choice",
        "first_token_ms": _WAITS,
        "samples": [1],
    }


ROWS: list[Row] = [
    LIMITS,
    _decode("decode", 1, 5.0, joules_per_token=3.0),
    _decode("decode", 64, 8.0),
    _decode("decode", 256, 10.0),
    {
        "part": "prefill",
        "what": "prefill",
        "prompts": 8,
        "prompt_tokens": 4096,
        "seconds": 1.0,
        "tokens_per_s": 32768.0,
        "operations": 500e12,
        "samples": [1],
    },
    _requests("requests", "engine alone", 64, 4000.0),
    _requests("requests", "engine alone", 256, 8000.0),
    _decode("small", 1, 2.0, shape="0.5b", device_idle_share=0.25),
    _requests("grpc", "through gRPC", 256, 7600.0),
    {
        "part": "users",
        "what": "users",
        "users": 200,
        "prompt_tokens": 256,
        "output_tokens": 128,
        "num_requests": 700,
        "first_token_ms": _WAITS,
        "first_16_tokens_ms": _WAITS,
        "samples": [1],
    },
    _requests("transformers", "transformers, continuous batching", 64, 2000.0),
    {
        "part": "transformers",
        "what": DID_NOT_END,
        "requests": 256,
        "seconds_at_least": 81.92,
        "samples": [1],
    },
    _decode("int8", 1, 4.0),
]


def test_ratios_are_what_the_rows_say() -> None:
    """By hand: 16 GB in 5 ms at 4 TB/s; 16 GB or 4 TOP in 10 ms; 500 TOP in a second; and so on."""
    assert ratios(ROWS) == pytest.approx(
        {
            "bandwidth_fraction_1_gpu": 0.8,
            "limit_fraction_gpu_64": 0.5,  # 4 ms to read, 1.25 to compute
            "limit_fraction_gpu_256": 0.5,  # 4 ms to read, 5 to compute
            "prefill_fraction_of_limit_gpu": 0.625,
            "gpu_over_transformers_cb_64": 2.0,
            "gpu_over_transformers_cb_256_at_least": 10.0,
            "grpc_path_over_engine_gpu_256": 0.95,
            "first_16_tokens_ms_gpu_200": 700.0,
            "int8_bandwidth_fraction_1_gpu": 1.0,
            "engine_int8_over_bf16_gpu_1": 1.25,
            "small_device_idle_share_gpu_1": 0.25,
        }
    )


def test_ratios_without_their_rows_are_not_there() -> None:
    """Nothing is made up where a part failed."""
    assert ratios([]) == {}
    assert ratios([row for row in ROWS if row["part"] in ("decode", "grpc")]) == {}


def test_table_says_results_aims_and_what_is_missing() -> None:
    """Met and missed aims, a bound, the floor and the gap, joules, and why parts have no rows."""
    text = table(Findings(ROWS, {"int8": "took longer than 60 s"}, {"burst": "no time was left"}))
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "0.800      >= 0.8    reached" in lines["decode 7b, 1 x 1100 tokens"]
    assert "5.00 ms a step, 200 tokens/s; floor 4.00 ms, gap 1.00 ms; 3 J a token" in text
    assert "0.500      >= 0.65   missed" in lines["decode 7b, 64 x 1100 tokens"]
    assert "700 ms     <= 800    reached" in lines["200 users, 256 in, 128 out: first 16"]
    assert "10.000" in lines["over transformers' batching, 256 requests"]
    assert "did not end in 82 s" in lines["over transformers' batching, 256 requests"]
    assert "FAILED int8: took longer than 60 s" in text
    assert "skipped burst: no time was left" in text
    assert "device idle 25.0%" in text


def test_aims_are_those_that_a_full_run_can_meet() -> None:
    """Each aim's ratio comes of the rows, so none is misspelt."""
    ended = [row for row in ROWS if row["what"] != DID_NOT_END]
    ended.append(_requests("transformers", "transformers, continuous batching", 256, 2000.0))
    assert set(AIMS) <= set(ratios(ended))


OUTPUT = """\
..s                                                      [100%]
================ gpu-check: NVIDIA H200 ================
copy bandwidth      passed: 49.7 GB/s
two ranks           skipped: 2 ranks need 2 CUDA devices
2 passed, 1 skipped in 98.80s (0:01:38)
"""


def test_checks_table_is_taken_out_of_the_output() -> None:
    """From its title on; the last line counts."""
    assert section(OUTPUT).splitlines()[:2] == [
        "gpu-check: NVIDIA H200",
        "copy bandwidth      passed: 49.7 GB/s",
    ]
    assert count(OUTPUT) == {"passed": 2, "skipped": 1}
    assert count("") == {}


def test_checks_that_take_too_long_or_do_not_start_are_faults() -> None:
    """The check goes on without them, and says why."""
    with pytest.raises(TimeoutError, match="longer than 1 s"):
        run_checks({}, 0.6, ("sleep", "600"))
    with pytest.raises(RuntimeError, match="ended with 1"):
        run_checks({}, 20.0, ("false",))


def test_without_a_gpu_it_says_what_it_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends well, and writes nothing over what a GPU once gave."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    folders = ["--work-dir", str(tmp_path / "work"), "--results-dir", str(tmp_path / "results")]
    assert main(["--only", *NAMES, "kernels", *folders]) == 0
    text = capsys.readouterr().out
    assert all(f"skipped {name}: no CUDA device" in text for name in (*NAMES, "kernels"))
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(600)  # seven processes that import torch, on a machine that may be busy
def test_every_part_runs_in_tiny_shapes_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine, a server with its callers, transformers' batching and INT8: each gives its rows,
    the result has the one format, the table is written, and the checkpoints are gone."""
    work_dir, results = tmp_path / "work", tmp_path / "results"
    folders = ["--work-dir", str(work_dir), "--results-dir", str(results)]
    code = main(["--tiny", "--device", "cpu", "--budget-s", "590", *folders])
    text = capsys.readouterr().out
    assert code == 0, text
    result = json.loads((results / "gpu.json").read_text())
    assert result_faults("gpu", result) == []
    assert {row["part"] for row in result["rows"]} == set(NAMES)
    assert set(result["ratios"]) >= {
        "bandwidth_fraction_1_gpu",
        "limit_fraction_gpu_2",
        "limit_fraction_gpu_4",
        "prefill_fraction_of_limit_gpu",
        "gpu_over_transformers_cb_2",
        "gpu_over_transformers_cb_4",
        "grpc_path_over_engine_gpu_4",
        "first_16_tokens_ms_gpu_3",
        "engine_int8_over_bf16_gpu_4",
    }
    written = (results / "gpu_check.txt").read_text()
    assert "gRPC over engine, 4" in written
    assert written.splitlines()[-1] in text
    assert not list(work_dir.glob("*/*.safetensors"))
