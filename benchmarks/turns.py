"""Contestants in turn, round by round, and what is read from it: ratios, rows, a table.

A ratio is the median over the rounds of one contestant's rate over another's in the same round, so
that a drift of a shared machine's speed cancels out. One that fails is out from there on.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.contestants.protocol import Message
from benchmarks.limits import MachineLimits, measure_limits

DECODE, END_TO_END = "decode_tokens_per_s", "output_tokens_per_s"
"""While all streams decode; from the first send to the last token."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where an answer belongs."""

    shape: str
    contestant: str
    concurrency: int


@dataclass(slots=True)
class Answer:
    """What a contestant said in one round, and the machine's limits just before and after."""

    round_number: int
    message: Message
    limits: tuple[MachineLimits, MachineLimits]

    @property
    def best_limits(self) -> MachineLimits:
        """The better of both: a limit is what can be reached at all."""
        one, other = self.limits
        return MachineLimits(
            max(one.read_bytes_per_s, other.read_bytes_per_s),
            max(one.bf16_ops_per_s, other.bf16_ops_per_s),
            max(one.int8_ops_per_s, other.int8_ops_per_s),
        )


@dataclass
class Turns:
    """All answers. State: these, who failed and why, and the newest limits."""

    measure: Callable[[], MachineLimits] = measure_limits
    answers: dict[Place, list[Answer]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """Contestant (in a shape: `shape/contestant`) -> why."""
    _limits: MachineLimits | None = None

    def take(self, place: Place, round_number: int, ask: Callable[[], Message]) -> None:
        """Let one contestant answer, unless it failed before; limits lie between all turns."""
        key = f"{place.shape}/{place.contestant}"
        if key in self.failures:
            return
        before = self._limits or self.measure()
        try:
            message = ask()
        except (RuntimeError, OSError) as error:
            self.fail(key, str(error))
            return
        if "seconds" in message:
            message[END_TO_END] = message["num_output_tokens"] / message["seconds"]
        self._limits = self.measure()
        answer = Answer(round_number, message, (before, self._limits))
        self.answers.setdefault(place, []).append(answer)
        said = {name: round(message[name], 1) for name in (DECODE, END_TO_END) if message.get(name)}
        print(f"  {place.shape} {place.contestant:22} at {place.concurrency:2}: {said}", flush=True)

    def fail(self, key: str, why: str) -> None:
        """Note that a contestant is out."""
        print(f"  {key} is out: {why}", flush=True)
        self.failures[key] = why

    def ratio(self, one: Place, other: Place, measure: str) -> float | None:
        """Return the median of the ratios of the rounds that have both; None without any."""
        theirs = self._by_round(other, measure)
        found = [
            value / theirs[number]
            for number, value in self._by_round(one, measure).items()
            if number in theirs
        ]
        return statistics.median(found) if found else None

    def median(self, place: Place, of: Callable[[Answer], float]) -> float | None:
        """Return the median over the rounds; None without any."""
        found = [of(answer) for answer in self.answers.get(place, ())]
        return statistics.median(found) if found else None

    def rows(self) -> list[dict[str, Any]]:  # Any: JSON
        """One row per place, medians with the limits beside them, then one per failure."""
        rows: list[dict[str, Any]] = []
        for place, answers in self.answers.items():
            row: dict[str, Any] = {
                "shape": place.shape,
                "contestant": place.contestant,
                "concurrency": place.concurrency,
            }
            for name in sorted(answers[0].message):
                values = [it.message[name] for it in answers if it.message[name] is not None]
                if values:
                    row[name] = round(statistics.median(values), 4)
            row["limits_before_and_after"] = [
                [_in_units(limits) for limits in answer.limits] for answer in answers
            ]
            row["samples"] = [answer.message for answer in answers]
            rows.append(row)
        rows += [
            {"contestant": name, "failed": why, "samples": [why]}
            for name, why in self.failures.items()
        ]
        return rows

    def table(self, shape: str, concurrencies: tuple[int, ...]) -> str:
        """Return a Markdown table: decode, and in brackets end to end, tokens/s."""
        places = [place for place in self.answers if place.shape == shape]
        lines = [
            f"| {shape}: decode (end to end), tokens/s | {' | '.join(map(str, concurrencies))} |",
            "|---|" + "---|" * len(concurrencies),
        ]
        for who in dict.fromkeys(place.contestant for place in places):
            cells = [self._cell(Place(shape, who, number)) for number in concurrencies]
            lines.append(f"| {who} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def _cell(self, place: Place) -> str:
        values = [list(self._by_round(place, it).values()) for it in (DECODE, END_TO_END)]
        decode, end_to_end = (f"{statistics.median(it):.0f}" if it else "–" for it in values)
        return f"{decode} ({end_to_end})" if any(values) else ""

    def _by_round(self, place: Place, measure: str) -> Mapping[int, float]:
        return {
            answer.round_number: answer.message[measure]
            for answer in self.answers.get(place, ())
            if answer.message.get(measure) is not None
        }


def _in_units(limits: MachineLimits) -> list[float]:
    """GB/s read, GFLOP/s in bf16, GOP/s in INT8."""
    return [
        round(value / 1e9, 1)
        for value in (limits.read_bytes_per_s, limits.bf16_ops_per_s, limits.int8_ops_per_s)
    ]
