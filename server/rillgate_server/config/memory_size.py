"""Amounts of memory as operators write them: `8GiB`, `0.4` of what is free, `auto`.

Owns the reading and its errors. What `auto` means is its user's business.
"""

import re
from dataclasses import dataclass

from rillgate_server.errors import ConfigError

MIN_BYTES = 64 << 10
MAX_BYTES = 1 << 50

_UNITS = {
    "": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}
_AMOUNT = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*([a-z]*)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class MemorySize:
    """An amount; at most one of its fields is set, none is `auto`."""

    num_bytes: int | None = None
    fraction: float | None = None
    """Of what is free, between 0 and 1."""

    def of(self, free_bytes: int) -> int | None:
        """Return the bytes where so many are free; None for `auto`."""
        return self.num_bytes if self.fraction is None else int(self.fraction * free_bytes)


def parse_memory_size(field: str, text: str, *, may_be_zero: bool) -> MemorySize:
    """Read an amount; raises ConfigError that names field, value and what is allowed."""
    if text.strip().lower() == "auto":
        return MemorySize()
    found = _AMOUNT.fullmatch(text.strip())
    unit = _UNITS.get(found[2].lower()) if found else None
    if found and unit is not None:
        amount = float(found[1]) * unit
        if 0 < amount < 1 and not found[2]:
            return MemorySize(fraction=amount)
        # A whole number is not rounded: floats hold no more than 2^53.
        num_bytes = int(found[1]) * unit if found[1].isdecimal() else int(amount)
        if MIN_BYTES <= num_bytes <= MAX_BYTES or (num_bytes == 0 and may_be_zero):
            return MemorySize(num_bytes=num_bytes)
    zero = "0 (none), " if may_be_zero else ""
    raise ConfigError(
        f"{field} is {text[:100]!r}; allowed: auto, {zero}64KiB to 1PiB as bytes or with one of "
        f"KB, MB, GB, TB, KiB, MiB, GiB, TiB, or a fraction of the free memory between 0 and 1"
    )
