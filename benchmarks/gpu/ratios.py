"""What is read from the rows: shares of the device's limits, ratios to others, and their aims.

Pure: the same rows give the same ratios, and a ratio whose rows are not there is not there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.gpu.rows import DID_NOT_END, Row, find
from benchmarks.gpu.served import FIRST_TOKENS
from benchmarks.gpu.work import Work


@dataclass(frozen=True, slots=True)
class Aim:
    """What a ratio should be."""

    value: float
    is_most: bool = False
    """Whether it should not be exceeded, rather than reached."""

    def is_met(self, found: float) -> bool:
        """Return whether a ratio is as it should be."""
        return found <= self.value if self.is_most else found >= self.value

    def __str__(self) -> str:
        return f"{'<=' if self.is_most else '>='} {self.value:g}"


AIMS = {
    "bandwidth_fraction_1_gpu": Aim(0.8),
    "limit_fraction_gpu_64": Aim(0.65),
    "limit_fraction_gpu_256": Aim(0.65),
    "prefill_fraction_of_limit_gpu": Aim(0.6),
    "gpu_over_transformers_cb_64": Aim(1.5),
    "gpu_over_transformers_cb_256": Aim(1.5),
    "grpc_path_over_engine_gpu_256": Aim(0.92),
    f"first_{FIRST_TOKENS}_tokens_ms_gpu_200": Aim(800.0, is_most=True),
}


def limit_s(row: Row, limits: Row, rate: str = "bf16_ops_per_s") -> float:
    """Return the least time of a row's work at the limits of its run."""
    work = Work(row["read_bytes"], row["operations"])
    return work.seconds(limits["read_bytes_per_s"], limits[rate])


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Return every ratio that the rows allow, by name."""
    return dict(
        [
            *_shares_of_limits(rows),
            *_over_transformers(rows),
            *_path(rows),
            *_int8(rows),
            *_idle(rows),
        ]
    )


def _shares_of_limits(rows: Sequence[Row]) -> Iterator[tuple[str, float]]:
    limits = find(rows, "limits")
    if limits is None:
        return
    for row in _all(rows, "decode"):
        step_s = row["step_ms"] / 1e3
        if row["batch"] == 1:
            bytes_per_s = row["read_bytes"] / step_s
            yield "bandwidth_fraction_1_gpu", bytes_per_s / limits["read_bytes_per_s"]
        else:
            yield f"limit_fraction_gpu_{row['batch']}", limit_s(row, limits) / step_s
    prefill = find(rows, "prefill", what="prefill")
    if prefill is not None:
        reached = prefill["operations"] / prefill["seconds"]
        yield "prefill_fraction_of_limit_gpu", reached / limits["bf16_ops_per_s"]


def _over_transformers(rows: Sequence[Row]) -> Iterator[tuple[str, float]]:
    for row in rows:
        ours = find(rows, "requests", what="engine alone", requests=row.get("requests"))
        if row["part"] != "transformers" or ours is None:
            continue
        name = f"gpu_over_transformers_cb_{row['requests']}"
        if "output_tokens_per_s" in row:
            yield name, ours["output_tokens_per_s"] / row["output_tokens_per_s"]
        elif row["what"] == DID_NOT_END:  # a lower bound, and said to be one by its row
            yield f"{name}_at_least", row["seconds_at_least"] / ours["seconds"]


def _path(rows: Sequence[Row]) -> Iterator[tuple[str, float]]:
    served = find(rows, "grpc", what="through gRPC")
    if served is not None:
        count = served["requests"]
        alone = find(rows, "requests", what="engine alone", requests=count)
        if alone is not None:
            ratio = served["output_tokens_per_s"] / alone["output_tokens_per_s"]
            yield f"grpc_path_over_engine_gpu_{count}", ratio
    users = find(rows, "users", what="users")
    if users is not None:
        name = f"first_{FIRST_TOKENS}_tokens_ms"
        yield f"{name}_gpu_{users['users']}", users[name]["p50"]


def _int8(rows: Sequence[Row]) -> Iterator[tuple[str, float]]:
    limits = find(rows, "limits")
    for row in _all(rows, "int8"):
        batch = row["batch"]
        if batch == 1 and limits is not None:
            bytes_per_s = row["read_bytes"] / (row["step_ms"] / 1e3)
            yield "int8_bandwidth_fraction_1_gpu", bytes_per_s / limits["read_bytes_per_s"]
        bf16 = find(rows, "decode", what="decode", batch=batch)
        if bf16 is not None:
            yield f"engine_int8_over_bf16_gpu_{batch}", bf16["step_ms"] / row["step_ms"]


def _idle(rows: Sequence[Row]) -> Iterator[tuple[str, float]]:
    for row in _all(rows, "small"):
        if row["device_idle_share"] is not None:
            yield f"small_device_idle_share_gpu_{row['batch']}", row["device_idle_share"]


def _all(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part and row["what"] == "decode"]
