"""The reasoning that the demo model learns to write: one short line for each small decision.

Owns the text between `<think>` and `</think>`. Knows nothing of phrasings, of the split or of
tokens.

Every token must be easy to predict from what stands before it, for a network of six small layers.
So numbers are padded to a fixed width (a digit's partner is then always the same distance away),
carries and verdicts are written down, and letters and list entries carry a capital letter as a
label that can be looked up.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

MAX_DIGITS = 4
MAX_DECIMALS = 3
MAX_LIST_DIGITS = 3
LABELS = string.ascii_uppercase


def _pairwise_verdicts(first: str, second: str) -> str:
    """Compare two strings of equal length position by position: `"12<33="`."""
    signs = []
    for a, b in zip(first, second, strict=True):
        if a.isdigit():
            signs.append(a + b + ("=" if a == b else "<" if a < b else ">"))
    return "".join(signs)


def _overall_verdict(first: str, second: str) -> str:
    return "=" if first == second else "<" if first < second else ">"


def addition(first: int, second: int) -> str:
    """Add from the lowest digit; each line is digit + digit + carry = two digits of sum."""
    a, b = str(first).zfill(MAX_DIGITS), str(second).zfill(MAX_DIGITS)
    lines = [f"{a}+{b}"]
    carry, digits = 0, ""
    for x, y in zip(reversed(a), reversed(b), strict=True):
        total = int(x) + int(y) + carry
        lines.append(f"{x}+{y}+{carry}={total:02d}")
        carry, digits = total // 10, str(total % 10) + digits
    return "\n".join([*lines, f"{carry}{digits}"])


def subtraction(first: int, second: int) -> str:
    """Find the larger number, then subtract the smaller; each line ends with borrow and digit."""
    a, b = str(first).zfill(MAX_DIGITS), str(second).zfill(MAX_DIGITS)
    verdict = _overall_verdict(a, b)
    lines = [f"{a}-{b}", _pairwise_verdicts(a, b) + ":" + verdict]
    if verdict == "<":
        a, b = b, a
    lines.append(f"{a}-{b}")
    borrow, digits = 0, ""
    for x, y in zip(reversed(a), reversed(b), strict=True):
        rest = int(x) - int(y) - borrow
        lines.append(f"{x}-{y}-{borrow}={int(rest < 0)}{rest % 10}")
        borrow, digits = int(rest < 0), str(rest % 10) + digits
    return "\n".join([*lines, ("-" if verdict == "<" else "+") + digits])


def counting(letter: str, word: str) -> str:
    """Spell the word with a label before each letter and the running count behind it."""
    count, spelled = 0, ""
    for label, character in zip(LABELS, word, strict=False):
        count += character == letter
        spelled += f"{label}{character}{count}"
    return f"{letter} in {word}\n{spelled}\n={count}"


def reversing(word: str) -> str:
    """Spell the word with labels, then read the labels backwards."""
    labelled = [label + character for label, character in zip(LABELS, word, strict=False)]
    return "\n".join([word, "".join(labelled), "".join(reversed(labelled))])


def sorting(numbers: Sequence[int], *, descending: bool) -> str:
    """Select the next number and write the rest again, until nothing is left.

    The label stands behind its number: written first, it would need the whole choice at once,
    while digits from the left narrow the choice one by one.
    """
    rest = [
        str(number).zfill(MAX_LIST_DIGITS) + label
        for label, number in zip(LABELS, numbers, strict=False)
    ]
    lines = [("down " if descending else "up ") + "".join(rest)]
    while rest:
        # The first of equal numbers goes first, in both directions.
        chosen = (max if descending else min)(rest, key=lambda entry: entry[:-1])
        rest.remove(chosen)
        lines.append(f"{chosen}:" + "".join(rest))
    return "\n".join(lines)


def padded_decimal(text: str) -> str:
    """Pad a number's text to four places before the point and three behind it."""
    whole, _, decimals = text.partition(".")
    return f"{whole.zfill(MAX_DIGITS)}.{decimals.ljust(MAX_DECIMALS, '0')}"


def comparing(first: str, second: str, *, smaller: bool) -> str:
    """Say what is asked, pad and compare place by place, give the verdict and the chosen one."""
    a, b = padded_decimal(first), padded_decimal(second)
    verdict = _overall_verdict(a, b)
    chosen = "=" if verdict == "=" else "a" if (verdict == "<") == smaller else "b"
    asked = "min" if smaller else "max"
    return f"{asked} {a} {b}\n{_pairwise_verdicts(a, b)}:{verdict}{chosen}"
