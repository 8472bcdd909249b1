"""The table at the end: a line per question with result, aim, floor, and what came of the parts."""

from collections.abc import Iterator, Sequence

from benchmarks.gpu.children import Findings
from benchmarks.gpu.ratios import AIMS, limit_s, ratios
from benchmarks.gpu.rows import BEGAN, DID_NOT_END, Row, find
from benchmarks.gpu.served import FIRST_TOKENS

_WIDTHS = (44, 10, 9, 9)
_HEAD = ("question", "result", "aim", "verdict", "what it is made of")
_NTH = f"first_{FIRST_TOKENS}_tokens_ms"

Line = tuple[str, str, str]
"""Question, the name of a ratio or a figure itself, details."""


def table(findings: Findings) -> str:
    """Return all of it as text."""
    found = ratios(findings.rows)
    lines = [_format(_HEAD)]
    for question, name, details in _lines(findings.rows):
        lines.append(_format((question, *_verdict(name, found), details)))
    for title, entries in (("FAILED", findings.failed), ("skipped", findings.skipped)):
        lines += [f"{title} {part}: {why}" for part, why in entries.items()]
    return "\n".join(lines)


def _verdict(name: str, found: dict[str, float]) -> tuple[str, str, str]:
    if name not in found:
        return name, "", ""
    value, aim = found[name], AIMS.get(name)
    text = f"{value:.0f} ms" if "_ms_" in name else f"{value:.3f}"
    if aim is None:
        return text, "", ""
    return text, str(aim), "reached" if aim.is_met(value) else "missed"


def _format(cells: Sequence[str]) -> str:
    widths = (*_WIDTHS, 0)
    return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _lines(rows: Sequence[Row]) -> Iterator[Line]:
    limits = find(rows, "limits")
    for row in rows:
        if row["what"] == BEGAN:
            continue
        match row["part"], row["what"]:
            case "limits", _:
                yield "the device at most", _rate(row["read_bytes_per_s"], "B/s"), _limits(row)
            case _, "load":
                yield f"loaded for {row['part']}", f"{row['seconds']:.1f} s", ""
            case _, "checkpoint":
                size = _rate(row["bytes"], "B")
                yield f"checkpoint {row['shape']}", f"{row['seconds']:.1f} s", size
            case (("decode" | "small" | "int8"), _):
                yield _decode(row, limits)
            case "prefill", _:
                yield _prefill(row, limits)
            case (("requests" | "grpc" | "transformers"), _):
                yield _requests(row)
            case (("users" | "burst"), _):
                yield from _users(row)


def _limits(row: Row) -> str:
    return (
        f"{row['device']}: reads {_rate(row['read_bytes_per_s'], 'B/s')}, copies "
        f"{_rate(row['copy_bytes_per_s'], 'B/s')}, bf16 {_rate(row['bf16_ops_per_s'], 'OP/s')} "
        f"(median {_rate(row['bf16_ops_per_s_median'], 'OP/s')}), int8 "
        f"{_rate(row['int8_ops_per_s'], 'OP/s')}"
    )


def _decode(row: Row, limits: Row | None) -> Line:
    part, batch = row["part"], row["batch"]
    question = f"decode {row['shape']}, {batch} x {row['context_tokens']:.0f} tokens"
    if row["quantization"] != "none":
        question += f", {row['quantization']}"
    name = {
        "decode": "bandwidth_fraction_1_gpu" if batch == 1 else f"limit_fraction_gpu_{batch}",
        "int8": f"engine_int8_over_bf16_gpu_{batch}",
        "small": f"{row['tokens_per_s']:.0f} t/s",
    }[part]
    details = f"{row['step_ms']:.2f} ms a step, {row['tokens_per_s']:.0f} tokens/s"
    if limits is not None:
        rate = "bf16_ops_per_s" if row["quantization"] == "none" else "int8_ops_per_s"
        floor_ms = limit_s(row, limits, rate) * 1e3
        details += f"; floor {floor_ms:.2f} ms, gap {row['step_ms'] - floor_ms:.2f} ms"
    if row["device_idle_share"] is not None:
        details += f"; device idle {row['device_idle_share']:.1%}"
    elif part == "small":
        details += "; device idle: the worker does not say"
    return question, name, details + _joules(row)


def _prefill(row: Row, limits: Row | None) -> Line:
    question = f"prefill, {row['prompts']} x {row['prompt_tokens']} tokens"
    details = f"{row['seconds'] * 1e3:.0f} ms, {row['tokens_per_s']:.0f} tokens/s"
    if limits is not None:
        floor_ms = row["operations"] / limits["bf16_ops_per_s"] * 1e3
        details += f"; floor {floor_ms:.0f} ms, gap {row['seconds'] * 1e3 - floor_ms:.0f} ms"
    return question, "prefill_fraction_of_limit_gpu", details


def _requests(row: Row) -> Line:
    count = row["requests"]
    if row["what"] == DID_NOT_END:
        at_least = f"did not end in {row['seconds_at_least']:.0f} s: at least so many times as fast"
        name = f"gpu_over_transformers_cb_{count}_at_least"
        return f"over transformers' batching, {count} requests", name, at_least
    sizes = f"{row['prompt_tokens']} in, {row['output_tokens']} out"
    rate = f"{row['output_tokens_per_s']:.0f} tokens/s"
    match row["part"]:
        case "transformers":
            details = f"theirs {rate}, {row['attention']} attention"
            name = f"gpu_over_transformers_cb_{count}"
            return f"over transformers' batching, {count} requests", name, details
        case "grpc":
            waits = _distribution(row["first_token_ms"])
            details = f"{rate}{_joules(row)}; first token {waits}"
            return f"gRPC over engine, {count}", f"grpc_path_over_engine_gpu_{count}", details
    return f"engine, {count} requests, {sizes}", rate.replace("tokens", "t"), _joules(row)[2:]


def _users(row: Row) -> Iterator[Line]:
    sizes = f"{row['prompt_tokens']} in, {row['output_tokens']} out"
    asked = f"{row['num_requests']} requests"
    if row["part"] == "users":
        question = f"{row['users']} users, {sizes}: first {FIRST_TOKENS}"
        name = f"{_NTH}_gpu_{row['users']}"
        yield question, name, f"{asked}, {_distribution(row[_NTH])}"
    else:
        question = f"{row['users']} at once, {sizes}: first {FIRST_TOKENS}"
        yield question, f"{row[_NTH]['p50']:.0f} ms", f"{asked}, {_distribution(row[_NTH])}"
    first = row["first_token_ms"]
    yield "  the first one", f"{first['p50']:.0f} ms", _distribution(first)


def _distribution(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f}" for name, value in found.items()) + " ms"


def _joules(row: Row) -> str:
    joules = row.get("joules_per_token")
    return "" if joules is None else f"; {joules:.3g} J a token"


def _rate(value: float, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.2f} {prefix}{unit}"
    return f"{value:.0f} {unit}"
