"""The demo model's six tasks: questions, their exact answers, the held-out split and the checker.

Owns what is asked and what is right. Standard library only. `rillgate evaluate` asks those that
`held_out` wrote beside the model.

A question's content (its operands, word or list, not its wording, order or direction) decides by a
stable hash whether it is held out, so no held-out content occurs in the training data, whatever its
phrasing.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from tools.train_demo import phrasings, reasoning
from tools.train_demo.words import any_word

# One content in this many is held out.
HELD_OUT_ONE_IN = 16
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Question:
    """One question with everything that is right about it."""

    task: str
    prompt: str  # what the user says
    reasoning: str  # what the model learns to think; not checked
    answer: str  # the exact text behind </think>, stripped
    content: str  # what the split hashes


def is_held_out(content: str) -> bool:
    """Say whether a content belongs to the held-out set; the same on every machine."""
    digest = hashlib.blake2b(content.encode(), digest_size=8, person=b"rillgate-demo").digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


def _integer(rng: random.Random) -> int:
    """Draw 0 to 9999; one to four digits are about equally likely, four a little more."""
    return rng.randrange(10 ** rng.choice((1, 2, 3, 4, 4)))


def _near(rng: random.Random, number: int) -> int:
    """Draw a number that shares its leading digits with `number`, or is that number."""
    spread = rng.choice((0, 5, 30, 200))
    return min(9999, max(0, number + rng.randint(-spread, spread)))


def _addition(rng: random.Random) -> Question:
    a, b = _integer(rng), _integer(rng)
    prompt = rng.choice(phrasings.ADDITION).format(a=a, b=b)
    content = f"addition {min(a, b)} {max(a, b)}"
    return Question("addition", prompt, reasoning.addition(a, b), f"{a} + {b} = {a + b}", content)


def _subtraction(rng: random.Random) -> Question:
    a = _integer(rng)
    b = _near(rng, a) if rng.random() < 0.15 else _integer(rng)
    if a < b and rng.random() < 0.4:
        a, b = b, a
    prompt = rng.choice(phrasings.SUBTRACTION).format(a=a, b=b)
    content = f"subtraction {min(a, b)} {max(a, b)}"
    return Question(
        "subtraction", prompt, reasoning.subtraction(a, b), f"{a} - {b} = {a - b}", content
    )


def _counting(rng: random.Random) -> Question:
    word = any_word(rng)
    letter = rng.choice(word) if rng.random() < 0.75 else rng.choice(_ALPHABET)
    count = word.count(letter)
    shown_letter = letter.upper() if rng.random() < 0.15 else letter
    shown_word = word.capitalize() if rng.random() < 0.1 else word
    template = rng.choice(phrasings.COUNTING)
    prompt = template.format(c=shown_letter, w=phrasings.quote(rng, shown_word))
    what = f"is 1 {letter}" if count == 1 else f"are {count} {letter}'s"
    answer = f"There {what} in {word}."
    return Question("counting", prompt, reasoning.counting(letter, word), answer, f"word {word}")


def _reversing(rng: random.Random) -> Question:
    word = any_word(rng)
    prompt = rng.choice(phrasings.REVERSING).format(w=phrasings.quote(rng, word))
    answer = f"{word} reversed is {word[::-1]}."
    return Question("reversing", prompt, reasoning.reversing(word), answer, f"word {word}")


def _sorting(rng: random.Random) -> Question:
    count = rng.randint(3, 6)
    numbers = [rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 3))) for _ in range(count)]
    if rng.random() < 0.15:
        numbers[-1] = rng.choice(numbers[:-1])
        rng.shuffle(numbers)
    descending = rng.random() < 0.4
    shown = rng.choice((", ", ", ", ", ", " ", ",", " and ")).join(map(str, numbers))
    if rng.random() < 0.15:
        shown = f"[{shown}]"
    templates = phrasings.SORTING_DOWN if descending else phrasings.SORTING_UP
    answer = "Sorted: " + ", ".join(map(str, sorted(numbers, reverse=descending)))
    return Question(
        "sorting",
        rng.choice(templates).format(l=shown),
        reasoning.sorting(numbers, descending=descending),
        answer,
        "sorting " + " ".join(map(str, sorted(numbers))),
    )


def _decimal(rng: random.Random, whole: int) -> str:
    places = rng.randint(1, reasoning.MAX_DECIMALS)
    return f"{whole}.{rng.randrange(10**places):0{places}d}"


def _two_numbers(rng: random.Random) -> tuple[str, str]:
    whole = rng.randrange(10 ** rng.choice((1, 1, 2, 3, 4)))
    kind = rng.random()
    if kind < 0.35:
        return str(whole), str(_near(rng, whole) if rng.random() < 0.4 else _integer(rng))
    if kind < 0.5:
        return _decimal(rng, whole), str(whole if rng.random() < 0.5 else _integer(rng))
    if kind < 0.55:
        text = _decimal(rng, whole)
        return text, (text + "0" if len(text.partition(".")[2]) < reasoning.MAX_DECIMALS else text)
    other = whole if rng.random() < 0.7 else _integer(rng)
    return _decimal(rng, whole), _decimal(rng, other)


def _comparing(rng: random.Random) -> Question:
    a, b = _two_numbers(rng)
    if rng.random() < 0.5:
        a, b = b, a
    smaller = rng.random() < 0.4
    templates = phrasings.COMPARING_SMALLER if smaller else phrasings.COMPARING_LARGER
    low, high = sorted((a, b), key=Decimal)
    if Decimal(a) == Decimal(b):
        answer = f"{a} and {b} are equal."
    elif smaller:
        answer = f"{low} is smaller than {high}."
    else:
        answer = f"{high} is larger than {low}."
    content = "comparing " + " ".join(sorted(map(reasoning.padded_decimal, (a, b))))
    prompt = rng.choice(templates).format(a=a, b=b)
    return Question(
        "comparing", prompt, reasoning.comparing(a, b, smaller=smaller), answer, content
    )


_MAKERS: dict[str, Callable[[random.Random], Question]] = {  # task name -> maker of one question
    "addition": _addition,
    "subtraction": _subtraction,
    "counting": _counting,
    "reversing": _reversing,
    "sorting": _sorting,
    "comparing": _comparing,
}
TASKS = tuple(_MAKERS)


def draw_question(task: str, rng: random.Random, *, held_out: bool) -> Question:
    """Draw one question of a task from the wanted side of the split."""
    while True:
        question = _MAKERS[task](rng)
        if is_held_out(question.content) == held_out:
            prompt = phrasings.decorate(rng, question.prompt)
            return Question(task, prompt, question.reasoning, question.answer, question.content)


def held_out_questions(task: str, n: int, seed: int = 0) -> list[Question]:
    """Return n held-out questions of a task, no two with one answer; the seed fixes them all."""
    rng = random.Random(f"{task} {seed}")
    chosen: dict[str, Question] = {}  # answer -> question
    while len(chosen) < n:
        question = draw_question(task, rng, held_out=True)
        chosen.setdefault(question.answer, question)
    return list(chosen.values())


def final_answer(text: str) -> str:
    """Return what stands behind the reasoning in a model's text."""
    return text.rpartition("</think>")[2].strip()


def is_correct(question: Question, text: str) -> bool:
    """Say whether a model's text, with its reasoning or without, gives exactly the right answer."""
    return final_answer(text) == question.answer
