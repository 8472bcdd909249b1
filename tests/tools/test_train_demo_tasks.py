"""The demo model's questions: right answers, strict checks, sound reasoning, a split that holds."""

from __future__ import annotations

import random
import re
from decimal import Decimal
from pathlib import Path

import pytest

from tools.train_demo import held_out, reasoning, tasks, words

NUMBER = re.compile(r"\d+(?:\.\d+)?")


def drawn(task: str, n: int = 400, *, held_out: bool = False) -> list[tasks.Question]:
    """Draw questions of one side with a fixed seed."""
    rng = random.Random(f"test {task}")
    return [tasks.draw_question(task, rng, held_out=held_out) for _ in range(n)]


@pytest.mark.parametrize("task", ["addition", "subtraction"])
def test_arithmetic_answers_are_what_python_computes(task: str) -> None:
    """The answer repeats the operands, and its result is their sum or difference."""
    for question in drawn(task):
        left, sign, right, equals, result = question.answer.split(" ")
        assert (sign, equals) == ("+" if task == "addition" else "-", "=")
        expected = int(left) + int(right) if sign == "+" else int(left) - int(right)
        assert int(result) == expected
        assert {left, right} <= set(NUMBER.findall(question.prompt))


def test_counting_answers_count_the_letter_that_is_asked_for() -> None:
    """The count in the answer is the word's, and both letter and word occur in the prompt."""
    for question in drawn("counting"):
        match = re.fullmatch(r"There (?:is (1) (\w)|are (\d) (\w)'s) in (\w+)\.", question.answer)
        assert match, question.answer
        count, letter, word = match[1] or match[3], match[2] or match[4], match[5]
        assert word.count(letter) == int(count)
        assert word in question.prompt.lower()
        assert letter in question.prompt.lower()


def test_reversing_answers_hold_the_word_backwards() -> None:
    """The answer names the word and its reverse."""
    for question in drawn("reversing"):
        match = re.fullmatch(r"(\w+) reversed is (\w+)\.", question.answer)
        assert match
        assert match[2] == "".join(reversed(match[1]))
        assert match[1] in question.prompt


def test_sorting_answers_are_the_prompts_numbers_in_the_asked_order() -> None:
    """The same numbers as in the prompt, ascending or descending; both directions occur."""
    directions = set()
    for question in drawn("sorting"):
        asked = [int(n) for n in NUMBER.findall(question.prompt)]
        answered = [int(n) for n in NUMBER.findall(question.answer)]
        descending = question.reasoning.startswith("down")
        assert answered == sorted(asked, reverse=descending)
        directions.add(descending)
    assert directions == {False, True}


def test_comparing_answers_follow_the_values_of_the_numbers() -> None:
    """Larger, smaller and equal are decided by the decimal value, and each of the three occurs."""
    seen = set()
    for question in drawn("comparing"):
        first, second = (Decimal(n) for n in NUMBER.findall(question.answer))
        if "equal" in question.answer:
            assert first == second
        elif "larger" in question.answer:
            assert first > second
        else:
            assert first < second
        seen.add(question.answer.split()[-3])
    assert len(seen) >= 3


@pytest.mark.parametrize("task", ["addition", "subtraction"])
def test_each_line_of_written_arithmetic_is_true_and_leads_to_the_result(task: str) -> None:
    """Digit lines hold, carries come from the line before, the last line is the result."""
    for question in drawn(task):
        lines = question.reasoning.split("\n")
        steps = [line for line in lines if re.fullmatch(r"\d[+-]\d[+-]\d=\d\d", line)]
        assert len(steps) == reasoning.MAX_DIGITS
        carry, digits = 0, ""
        for step in steps:
            x, y, carried, high, low = (int(digit) for digit in re.findall(r"\d", step))
            assert carried == carry
            value = x + y + carry if task == "addition" else x - y - carry
            assert 10 * high + low == value if task == "addition" else low - 10 * high == value
            carry, digits = high, f"{low}{digits}"
        result = int(f"{carry}{digits}") if task == "addition" else int(lines[-1][0] + digits)
        assert str(result) == question.answer.split(" ")[-1]
        assert int(lines[-1]) == result


def test_counting_and_reversing_spell_the_word_letter_by_letter() -> None:
    """Labels run from A, letters spell the word, the running count ends in the answer's."""
    for question in drawn("counting"):
        spelled = question.reasoning.split("\n")[1]
        word = question.answer.removesuffix(".").split(" ")[-1]
        assert spelled[1::3] == word
        assert spelled[0::3] == reasoning.LABELS[: len(word)]
        assert spelled[-1] == question.reasoning[-1]
        assert spelled[-1] in question.answer
    for question in drawn("reversing"):
        word, forwards, backwards = question.reasoning.split("\n")
        assert forwards[1::2] == word
        assert f"is {backwards[1::2]}." in question.answer


def test_sorting_removes_one_number_a_line_until_none_is_left() -> None:
    """The chosen heads of the lines, in turn, are the sorted answer; nothing is lost on the way."""
    for question in drawn("sorting"):
        first, *lines = question.reasoning.split("\n")
        entries = re.findall(r"\d{3}[A-F]", first)
        heads = []
        for line in lines:
            now = re.findall(r"\d{3}[A-F]", line)
            assert sorted(now) == sorted(entries)
            heads.append(now[0])
            entries = now[1:]
        assert not entries
        assert "Sorted: " + ", ".join(str(int(head[:-1])) for head in heads) == question.answer


def test_comparing_verdict_is_the_first_difference() -> None:
    """The overall sign is the sign of the first pair that is not equal, and fits the answer."""
    for question in drawn("comparing"):
        pairs, _, decided = question.reasoning.split("\n")[1].rpartition(":")
        verdict, chosen = decided[0], decided[1:]
        signs = [sign for sign in pairs[2::3] if sign != "="]
        assert verdict == (signs[0] if signs else "=")
        for x, y, sign in zip(pairs[0::3], pairs[1::3], pairs[2::3], strict=True):
            assert sign == ("=" if x == y else "<" if x < y else ">")
        assert (verdict == "=") == ("equal" in question.answer)
        if verdict != "=":
            first, second = NUMBER.findall(question.prompt)
            assert question.answer.startswith(first if chosen == "a" else second)
            assert ("min" in question.reasoning) == ("smaller" in question.answer)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_checker_accepts_the_answer_and_nothing_else(task: str) -> None:
    """Exact match behind the reasoning: a changed digit or letter, or an added word, is wrong."""
    for question in drawn(task, 20):
        assert tasks.is_correct(question, question.answer)
        assert tasks.is_correct(question, f"{question.reasoning}\n</think>\n\n{question.answer}")
        assert not tasks.is_correct(question, "")
        assert not tasks.is_correct(question, question.reasoning)
        assert not tasks.is_correct(question, f"{question.answer}\n</think>\n\n")
        assert not tasks.is_correct(question, question.answer + " Surely.")
        for position, character in enumerate(question.answer):
            if character.isalnum():
                other = "x" if character != "x" else "y"
                changed = question.answer[:position] + other + question.answer[position + 1 :]
                assert not tasks.is_correct(question, changed)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_held_out_questions_are_many_distinct_and_reproducible(task: str) -> None:
    """500 questions, no two alike, the same for the same seed, other ones for another seed."""
    questions = tasks.held_out_questions(task, 500, seed=0)
    assert len({question.prompt for question in questions}) == 500
    assert questions == tasks.held_out_questions(task, 500, seed=0)
    assert questions != tasks.held_out_questions(task, 500, seed=1)
    assert all(tasks.is_held_out(question.content) for question in questions)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_no_held_out_content_is_drawn_for_training(task: str) -> None:
    """Not by the hash alone: what the questions ask about is compared too, whatever its order."""

    def asked_about(question: tasks.Question) -> tuple[str, ...]:
        if task in ("counting", "reversing"):
            return (question.reasoning.split("\n")[0].split(" ")[-1],)
        numbers = NUMBER.findall(question.answer)
        if task in ("addition", "subtraction"):
            numbers = numbers[:2]
        return tuple(sorted(str(Decimal(number).normalize()) for number in numbers))

    held_out = {asked_about(q) for q in tasks.held_out_questions(task, 500, seed=0)}
    training = {asked_about(q) for q in drawn(task, 2000)}
    assert not held_out & training


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_task_is_asked_in_many_phrasings(task: str) -> None:
    """With numbers and words taken out, at least 15 wordings are left."""
    wordings = set()
    for question in drawn(task):
        text = question.prompt.lower()
        for known in {*NUMBER.findall(text), *re.findall(r"\w+", question.answer.lower())}:
            text = re.sub(rf"\b{re.escape(known)}\b", "_", text)
        wordings.add(text)
    assert len(wordings) >= 15


def test_the_word_list_has_some_hundreds_of_plain_words() -> None:
    """Lower-case letters only, of the lengths that the tasks promise; strawberry is one of them."""
    common = words.common_words()
    assert len(common) >= 400
    assert "strawberry" in common
    rng = random.Random(0)
    for word in (*common, *(words.any_word(rng) for _ in range(500))):
        assert re.fullmatch(rf"[a-z]{{{words.MIN_WORD_LEN},{words.MAX_WORD_LEN}}}", word)


def test_the_split_is_the_same_on_every_machine() -> None:
    """Vectors of the hash on both sides; about one content in sixteen is held out."""
    assert tasks.is_held_out("word raspberry")
    assert not tasks.is_held_out("word strawberry")
    assert not tasks.is_held_out("comparing 0009.110 0009.900")
    share = sum(tasks.is_held_out(f"word w{i}") for i in range(8_000)) / 8_000
    assert share == pytest.approx(1 / tasks.HELD_OUT_ONE_IN, abs=0.01)


def test_the_files_beside_the_model_are_what_the_tool_writes() -> None:
    """So they are held-out questions, and a changed phrasing does not go unnoticed."""
    folder = Path(__file__).parents[2] / "models" / "demo"
    assert (folder / held_out.TASK_FILE).read_text(encoding="utf-8") == held_out.task_lines()
    assert (folder / held_out.TEXT_FILE).read_text(encoding="utf-8") == held_out.text()
