"""The many ways in which a question may be put.

Owns the wording. Knows nothing of answers. A phrasing is a template with named places; `decorate`
adds what people add around a question: politeness, case, missing or doubled punctuation.
"""

from __future__ import annotations

import random

ADDITION = (
    "What is {a} + {b}?",
    "{a}+{b}",
    "{a} + {b}",
    "{a} + {b} = ?",
    "{a}+{b}=",
    "Add {a} and {b}.",
    "Compute the sum of {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "How much is {a} plus {b}?",
    "What is {a} plus {b}?",
    "Calculate {a} + {b}.",
    "What do you get when you add {a} to {b}?",
    "I have {a} apples and get {b} more. How many apples do I have?",
    "Find the sum: {a} + {b}",
    "Sum {a} and {b}",
    "{a} plus {b}",
    "What's {a}+{b}?",
    "Can you add {a} and {b} for me?",
    "What does {a} + {b} equal?",
    "Work out {a} + {b}.",
    "Tell me the total of {a} and {b}.",
    "Solve {a} + {b}",
)

SUBTRACTION = (
    "What is {a} - {b}?",
    "{a}-{b}",
    "{a} - {b}",
    "{a} - {b} = ?",
    "{a}-{b}=",
    "Subtract {b} from {a}.",
    "How much is {a} minus {b}?",
    "What is {a} minus {b}?",
    "Calculate {a} - {b}.",
    "Take {b} away from {a}.",
    "What do you get when you subtract {b} from {a}?",
    "Compute {a} - {b}.",
    "{a} minus {b}",
    "What's {a}-{b}?",
    "What is left when {b} is taken from {a}?",
    "Can you subtract {b} from {a} for me?",
    "Solve {a} - {b}",
    "What does {a} - {b} equal?",
    "Work out {a} - {b}.",
    "Find {a} minus {b}.",
    "Tell me {a} minus {b}.",
)

COUNTING = (
    "How many {c}'s are in {w}?",
    "How many {c}'s are there in {w}?",
    "How many {c}s are in {w}?",
    "How many times does the letter {c} appear in {w}?",
    "Count the letter {c} in {w}.",
    "Count the {c}'s in {w}.",
    "How often does {c} occur in {w}?",
    "How many {c}'s does {w} have?",
    "How many letters {c} are in the word {w}?",
    "How many {c}'s are in the word {w}?",
    "In the word {w}, how many {c}'s are there?",
    "Tell me how many times {c} appears in {w}.",
    "What is the number of {c}'s in {w}?",
    "number of {c} in {w}",
    "count {c} in {w}",
    "Look at the word {w}. How many {c}'s does it contain?",
    "Can you count the {c}'s in {w}?",
    "How many {c} in {w}?",
    "How many of the letters in {w} are {c}?",
    "Find how often the letter {c} is used in {w}.",
)

REVERSING = (
    "Reverse the word {w}.",
    "Reverse {w}.",
    "reverse {w}",
    "Spell {w} backwards.",
    "Write {w} backwards.",
    "What is {w} spelled backwards?",
    "What is {w} reversed?",
    "How do you spell {w} backwards?",
    "Write the word {w} in reverse.",
    "Turn the word {w} around.",
    "Give me {w} in reverse order.",
    "What does {w} look like backwards?",
    "Can you reverse the word {w}?",
    "Reverse the letters of {w}.",
    "Reverse this word: {w}",
    "Flip the letters of the word {w}.",
    "What do you get when you reverse {w}?",
    "{w} backwards",
    "Please spell the word {w} in reverse.",
    "Read {w} from right to left.",
)

SORTING_UP = (
    "Sort {l}.",
    "Sort these numbers: {l}",
    "Sort the numbers {l}.",
    "Sort {l} in ascending order.",
    "Sort {l} from smallest to largest.",
    "Put {l} in order.",
    "Order these numbers from small to large: {l}",
    "Arrange {l} in ascending order.",
    "Arrange the numbers {l} from lowest to highest.",
    "sort {l} ascending",
    "What is {l} in sorted order?",
    "Put the numbers {l} in increasing order.",
    "Can you sort {l}?",
    "Sort the list {l}.",
    "Order the list {l} from smallest to biggest.",
    "List {l} from least to greatest.",
    "Rank {l} from low to high.",
)

SORTING_DOWN = (
    "Sort {l} in descending order.",
    "Sort {l} from largest to smallest.",
    "Sort these numbers in descending order: {l}",
    "Order these numbers from large to small: {l}",
    "Arrange {l} in descending order.",
    "sort {l} descending",
    "Arrange the numbers {l} from highest to lowest.",
    "Put the numbers {l} in decreasing order.",
    "Order the list {l} from biggest to smallest.",
    "List {l} from greatest to least.",
    "Rank {l} from high to low.",
    "Can you sort {l} from high to low?",
    "Sort the list {l} in reverse order.",
    "Sort {l}, largest first.",
    "Put {l} in order, biggest first.",
    "Sort the numbers {l} descending.",
)

COMPARING_LARGER = (
    "Which is larger, {a} or {b}?",
    "Which is bigger, {a} or {b}?",
    "Which number is greater: {a} or {b}?",
    "Which is greater, {a} or {b}?",
    "What is larger: {a} or {b}?",
    "Which of {a} and {b} is larger?",
    "Compare {a} and {b}.",
    "Compare the numbers {a} and {b}.",
    "{a} or {b}, which is bigger?",
    "Which one is the larger number, {a} or {b}?",
    "Of {a} and {b}, which is the greater?",
    "larger: {a} or {b}",
    "Tell me which is bigger: {a} or {b}.",
    "What is the larger of {a} and {b}?",
    "Is {a} or {b} larger?",
    "Is {a} larger than {b}?",
    "Is {a} bigger than {b}?",
    "Is {a} greater than {b}?",
    "max of {a} and {b}?",
)

COMPARING_SMALLER = (
    "Which is smaller, {a} or {b}?",
    "Which is less, {a} or {b}?",
    "Which number is smaller: {a} or {b}?",
    "What is smaller: {a} or {b}?",
    "Which of {a} and {b} is smaller?",
    "{a} or {b}, which is smaller?",
    "Which one is the smaller number, {a} or {b}?",
    "Of {a} and {b}, which is the smaller?",
    "Tell me which is smaller: {a} or {b}.",
    "What is the smaller of {a} and {b}?",
    "Is {a} or {b} smaller?",
    "Is {a} smaller than {b}?",
    "Is {a} less than {b}?",
    "smaller: {a} or {b}",
    "min of {a} and {b}?",
    "Which is lower, {a} or {b}?",
)

_BEFORE = (
    "Please ",
    "Hi! ",
    "Hello, ",
    "Hey, ",
    "Quick question: ",
    "Question: ",
    "OK. ",
    "Now: ",
    "And ",
    "Q: ",
)
_AFTER = (
    " Think step by step.",
    " Please.",
    " Thanks!",
    " Thank you.",
    " Give only the answer.",
    "\nAnswer:",
    " Please answer briefly.",
    " Explain.",
    " Be careful.",
    " Please think carefully before you answer.",
)


def decorate(rng: random.Random, text: str) -> str:
    """Vary what stands around a question; the question's own words and numbers stay."""
    if rng.random() < 0.12:
        text = rng.choice(_BEFORE) + text
    if rng.random() < 0.12:
        text = text.rstrip("?.!")
    elif rng.random() < 0.04:
        text += rng.choice(("?", "!", "??", " ?"))
    if rng.random() < 0.10:
        text += rng.choice(_AFTER)
    if rng.random() < 0.15:
        text = text.lower()
    if rng.random() < 0.05:
        text = rng.choice((f" {text}", f"{text} ", f"{text}\n"))
    return text


def quote(rng: random.Random, word: str) -> str:
    """Put a word in quotation marks, or leave it bare (more than half the time)."""
    if rng.random() < 0.6:
        return word
    opening, closing = rng.choice((('"', '"'), ("'", "'"), ("“", "”"), ("`", "`"), ("**", "**")))
    return opening + word + closing
